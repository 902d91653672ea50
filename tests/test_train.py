"""The training step against an independent few-line re-derivation, on one process and on two."""

import copy
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import nn

from fastssl.augment.policy import make_policy
from fastssl.augment.views import make_views
from fastssl.batch import pack_images
from fastssl.build import Trainee, compile_and_wrap, make_deterministic, make_trainee, wrap_ddp
from fastssl.config import Config, replace
from fastssl.distributed import Ranks
from fastssl.health import Health, NonFiniteLoss
from fastssl.input_stream import IN_TURN, InputStream
from fastssl.key_shuffle import in_rank_order
from fastssl.moco import MoCo
from fastssl.models.batchnorm import split_batchnorm
from fastssl.optim import make_optimizer
from fastssl.plan import Plan
from fastssl.random_key import STREAM_SHUFFLE, permutation
from fastssl.train import make_train_step

DIM, SIZE, STEPS, LR, WD, M, T = 8, 16, 3, 0.5, 1e-3, 0.9, 0.2
POLICY = make_policy("v2")


def make_config(**values):
    fixed = dict(
        image_size=SIZE, dim=DIM, queue_size=11, batch_size=8, lr=LR, weight_decay=WD, ema_momentum=M, temperature=T,
        contrast_weight=0.7, uniform_t=2.0, lr_schedule="step", milestones=(1,), epochs=4, device="cpu", seed=3,
        precision="fp32",
    )  # fmt: skip
    return replace(Config(), **{**fixed, **values})


def make_encoder():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, DIM),
    )  # fmt: skip


def make_step(config, rank=0, world_size=1, steps_per_epoch=2):
    ranks = Ranks(rank, world_size, torch.device("cpu"))
    encoder = make_encoder()
    if config.model.bn_splits > 1:
        split_batchnorm(encoder, config.model.bn_splits)
    moco = MoCo(encoder, DIM, config.moco.queue_size, config.train.seed).train()
    o = config.optim
    optimizer = make_optimizer(moco.encoder_q, "sgd", lr=o.lr, momentum=o.momentum, weight_decay=o.weight_decay)
    wrapped = wrap_ddp(moco.encoder_q, ranks.device) if world_size > 1 else moco.encoder_q
    trainee = Trainee(moco, wrapped, optimizer, torch.amp.GradScaler("cpu", enabled=False))
    plan = Plan(config, steps_per_epoch, config.train.epochs * steps_per_epoch, config.train.epochs * steps_per_epoch)
    health = Health(ranks)
    return trainee, make_train_step(config, plan, trainee, POLICY, ranks, health), health


def images(step, batch=8):
    random = np.random.default_rng(step)
    arrays = [random.integers(0, 256, (20 + i, 30 - i, 3), dtype=np.uint8) for i in range(batch)]
    return arrays, [100 * step + i for i in range(batch)]


def share(step, rank, world_size):
    arrays, index = images(step)
    size = len(arrays) // world_size
    mine = slice(rank * size, (rank + 1) * size)
    return pack_images(arrays[mine], index[mine], [0] * size)


def published_loss(q, k, queue, config):
    """As printed in the papers: cross entropy of [q.k | q.queue], ||q-k||^2, log of the mean over all pairs."""
    c = config.loss
    s = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1)
    contrast = F.cross_entropy(s / c.temperature, torch.zeros(len(q), dtype=torch.long))
    align = (q - k).norm(dim=1).pow(2).mean()
    d2 = torch.cat([(2 - 2 * q @ queue.T).flatten(), torch.pdist(q).square()])
    uniform = (-c.uniform_t * d2).exp().mean().log()
    return c.contrast_weight * contrast + c.align_weight * align + c.uniform_weight * uniform


def rederive(config, world_size):
    """The references' loop for `world_size` ranks, in one process and float64, one line a rule."""
    seed, ways = config.train.seed, 1 + config.moco.symmetric
    enc = [make_encoder().double() for _ in range(world_size)]  # rank r's encoder_q: same weights, own BN buffers
    enc_k = copy.deepcopy(enc)
    queue = MoCo(make_encoder(), DIM, config.moco.queue_size, seed).queue.double().clone()
    pointer, velocity, totals = 0, None, []
    for step in range(STEPS):
        epoch = step // 2
        lr = LR * (0.1 if epoch >= 1 else 1.0)
        views = [make_views(share(step, r, world_size), POLICY, SIZE, seed, epoch) for r in range(world_size)]
        for model_k, model in zip(enc_k, enc):  # momentum update before the keys
            for p_k, p in zip(model_k.parameters(), model.parameters()):
                p_k.data = M * p_k.data + (1 - M) * p.data
        if config.moco.symmetric:
            views = [(torch.cat([a, b]), torch.cat([b, a])) for a, b in views]
        view_k = torch.cat([v[1] for v in views]).double()
        if world_size > 1:
            order = permutation(seed, step, len(view_k), STREAM_SHUFFLE)
            shuffled = view_k[order].chunk(world_size)
            keys = torch.cat([F.normalize(m(v), dim=1) for m, v in zip(enc_k, shuffled)])[order.argsort()].detach()
        else:
            keys = F.normalize(enc_k[0](view_k), dim=1).detach()
        queries = [F.normalize(m(v[0].double()), dim=1) for m, v in zip(enc, views)]
        losses = [
            # the queue before this step; the mean over both ways where the loss is symmetric
            torch.stack([published_loss(*way, queue, config) for way in zip(q.chunk(ways), k.chunk(ways))]).mean()
            for q, k in zip(queries, keys.chunk(world_size))
        ]
        for model, loss in zip(enc, losses):
            model.zero_grad()
            loss.backward()
        grads = [torch.stack(g).mean(0) for g in zip(*[[p.grad for p in m.parameters()] for m in enc])]
        grads = [g + WD * p.data for g, p in zip(grads, enc[0].parameters())]
        velocity = grads if velocity is None else [0.9 * v + g for v, g in zip(velocity, grads)]
        for model in enc:
            for p, v in zip(model.parameters(), velocity):
                p.data = p.data - lr * v
        for key in keys:  # enqueued after the loss, in rank order
            queue[pointer] = key
            pointer = (pointer + 1) % len(queue)
        totals.append([loss.item() for loss in losses])
    return enc[0], enc_k[0], queue, pointer, totals


def run_steps(rank, world_size, config):
    trainee, train_step, _ = make_step(config, rank, world_size)
    metrics = [train_step(share(step, rank, world_size), step) for step in range(STEPS)]
    return {k: v.numpy() for k, v in trainee.moco.state_dict().items()}, [float(m["loss"]) for m in metrics]


def compare(result, truth, rank):
    state, totals = result
    enc_q, enc_k, queue, pointer, true_totals = truth
    np.testing.assert_allclose(totals, [t[rank] for t in true_totals], rtol=2e-5)
    for name, module in (("encoder_q", enc_q), ("encoder_k", enc_k)):
        for key, value in module.state_dict().items():
            if rank == 0 or "running" not in key:
                np.testing.assert_allclose(state[f"{name}.{key}"], value, rtol=1e-4, atol=2e-5, err_msg=f"{name}.{key}")
    np.testing.assert_allclose(state["queue"], queue, atol=2e-5)
    assert state["queue_ptr"].tolist() == [pointer]


@pytest.mark.parametrize("symmetric", [False, True])
def test_three_steps_follow_the_reference_semantics(symmetric):
    config = make_config(symmetric=symmetric)
    compare(run_steps(0, 1, config), rederive(config, 1), 0)


def two_ranks(rank, world_size, config, config_bn):
    both = replace(config, symmetric=True)
    return run_steps(rank, world_size, config), one_step(rank, world_size, config_bn), run_steps(rank, world_size, both)


def one_step(rank, world_size, config):
    """Loss, gradient and running statistics of the first step."""
    trainee, train_step, _ = make_step(config, rank, world_size)
    grads = []
    trainee.optimizer.register_step_pre_hook(
        lambda *_: grads.extend(p.grad.clone().numpy() for p in trainee.moco.encoder_q.parameters())
    )
    metrics = train_step(share(0, rank, world_size), 0)
    buffers = {k: v.numpy() for k, v in trainee.moco.named_buffers() if "running" in k}
    return float(metrics["loss"]), grads, buffers


def test_two_ranks_follow_the_reference_semantics_and_equal_split_batch_norm_on_one():
    # without the uniform term: it pools pairs per rank, so one process with twice the batch has another value
    bn = make_config(uniform_weight=0.0)
    results = run_ranks(two_ranks, 2, make_config(), bn)
    truth, symmetric = rederive(make_config(), 2), rederive(make_config(symmetric=True), 2)
    for rank in (0, 1):
        compare(results[rank][0], truth, rank)
        compare(results[rank][2], symmetric, rank)

    (loss0, grads0, buffers0), (loss1, grads1, buffers1) = results[0][1], results[1][1]
    loss, grads, buffers = one_step(0, 1, replace(bn, bn_splits=2))
    assert math.isclose(loss, (loss0 + loss1) / 2, rel_tol=1e-5)
    for one, a, b in zip(grads, grads0, grads1):
        np.testing.assert_array_equal(a, b)  # DDP averaged them
        np.testing.assert_allclose(one, a, rtol=1e-5, atol=1e-5)
    for name in buffers:
        np.testing.assert_allclose(buffers[name], (buffers0[name] + buffers1[name]) / 2, rtol=1e-5, atol=1e-5)


def test_split_batch_norm_hides_which_keys_share_statistics():
    """With one sub-batch the shuffle is off and would change nothing; with two it changes the keys."""
    plain, split = (one_step(0, 1, make_config(bn_splits=s))[0] for s in (1, 2))
    assert plain != split


def test_accumulation_equals_one_large_batch_where_nothing_depends_on_the_batch():
    """Without batch norm and the pooled uniform term, 4 micro-batches are one batch: loss, weights and queue."""
    config = make_config(uniform_weight=0.0)

    def run(accumulate):
        trainee, train_step, _ = make_step(replace(config, accumulate=accumulate))
        trainee.moco.eval()  # batch norm by its running statistics
        for step in range(STEPS):
            metrics = train_step(share(step, 0, 1), step)
        return trainee.moco.state_dict(), float(metrics["loss"])

    (one, loss_one), (four, loss_four) = run(1), run(4)
    assert math.isclose(loss_one, loss_four, rel_tol=1e-5)
    for key in one:
        torch.testing.assert_close(one[key], four[key], rtol=1e-4, atol=1e-5)


def test_gradient_clipping_bounds_the_update():
    config = make_config(clip_grad=1e-3, weight_decay=0.0)
    trainee, train_step, _ = make_step(config)
    before = [p.detach().clone() for p in trainee.moco.encoder_q.parameters()]
    metrics = train_step(share(0, 0, 1), 0)
    after = [p.detach() for p in trainee.moco.encoder_q.parameters()]
    moved = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(after, before)))
    assert float(metrics["grad_norm"]) > 1e-3
    assert moved == pytest.approx(LR * 1e-3, rel=1e-3)


def test_bf16_autocast_stays_near_fp32():
    fp32, bf16 = (one_step(0, 1, make_config(precision=p))[0] for p in ("fp32", "bf16"))
    assert fp32 != bf16 and fp32 == pytest.approx(bf16, rel=0.05)


def test_a_loss_that_is_not_finite_is_named_with_its_step_and_terms():
    trainee, train_step, health = make_step(make_config())
    for step in range(4):
        if step == 2:
            with torch.no_grad():
                trainee.moco.encoder_q[0].weight[0, 0, 0, 0] = float("nan")
        if step < 2:
            train_step(share(step, 0, 1), step)
            health.check(trainee.moco.encoder_q)
        else:
            train_step(share(step, 0, 1), step)
    with pytest.raises(NonFiniteLoss, match=r"not finite at step 3 .*loss nan.*0\.weight.*; use a lower --lr"):
        health.check(trainee.moco.encoder_q)


def test_inputs_that_are_not_unit_rows_are_refused_at_the_first_step():
    trainee, train_step, _ = make_step(make_config())
    trainee.moco.queue.mul_(2)
    with pytest.raises(ValueError, match=r"queue.* not unit vectors"):
        train_step(share(0, 0, 1), 0)


def test_with_debug_they_are_refused_at_any_step():
    for debug in (False, True):
        trainee, train_step, _ = make_step(make_config(debug=debug))
        train_step(share(0, 0, 1), 0)
        trainee.moco.queue.mul_(2)
        with pytest.raises(ValueError, match=r"queue.* not unit vectors") if debug else nullcontext():
            train_step(share(1, 0, 1), 1)


@pytest.mark.gpu
def test_a_step_never_waits_for_the_device():
    ranks = Ranks(0, 1, torch.device("cuda"))
    config = make_config(bn_splits=2, clip_grad=1.0, precision="fp16")
    encoder = make_encoder()
    split_batchnorm(encoder, 2)
    moco = MoCo(encoder, DIM, 11, 3).cuda().train()
    optimizer = make_optimizer(moco.encoder_q, "sgd", lr=LR, momentum=0.9, weight_decay=WD)
    trainee = Trainee(moco, moco.encoder_q, optimizer, torch.amp.GradScaler("cuda"))
    train_step = make_train_step(config, Plan(config, 2, 8, 8), trainee, POLICY, ranks, Health(ranks))
    batches = [share(step, 0, 1).to("cuda") for step in range(3)]
    train_step(batches[0], 0)  # the first step checks its inputs and builds the optimiser's state
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in (1, 2):
            train_step(batches[step], step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_gpu(steps, **values):
    """Losses of so many steps on a GPU, batches drawn by an input stream or ready on the current one."""
    torch.compiler.reset()  # sizes of earlier tests would become symbols, and count towards the limit of compilations
    inputs = InputStream(torch.device("cuda")) if values.pop("overlap") else IN_TURN
    config = make_config(**{"device": "cuda", "channels_last": "on", "arch": "resnet18", **values})
    ranks = Ranks(0, 1, torch.device("cuda"))
    trainee = compile_and_wrap(config, make_trainee(config, ranks), ranks)
    train_step = make_train_step(config, Plan(config, 2, 8, 8), trainee, POLICY, ranks, Health(ranks), inputs)
    batches = (share(step, 0, 1).to("cuda") for step in range(steps))
    losses = [train_step(batch, step)["loss"] for step, batch in enumerate(inputs.draw(batches))]
    return [float(loss) for loss in losses]  # read at the end: until then nothing waits for the GPU


@pytest.fixture
def deterministic():
    benchmark = torch.backends.cudnn.benchmark
    make_deterministic(True)
    yield
    make_deterministic(False)
    torch.backends.cudnn.benchmark = benchmark


@pytest.mark.gpu
def test_views_made_beside_the_training_give_the_same_steps(deterministic):
    in_turn, overlapped = (on_gpu(6, overlap=o, compile="off") for o in (False, True))
    np.testing.assert_allclose(overlapped, in_turn, rtol=1e-6)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # torch captures one itself, to have a pool of memory
def test_cuda_graphs_train_as_compiled_encoders_do(deterministic):
    graphs, compiled = (on_gpu(8, overlap=True, compile=c, image_size=32) for c in ("graphs", "on"))
    np.testing.assert_allclose(graphs, compiled, rtol=1e-3)


def test_without_a_gpu_batches_are_drawn_as_they_come_and_views_made_in_turn():
    inputs = InputStream(torch.device("cpu"))
    assert list(inputs.draw(iter("abc"))) == ["a", "b", "c"]
    assert inputs.run(lambda *args: args, 1, 2) == (1, 2)


def test_an_unfinished_draw_ends_its_source():
    ended = []

    def source():
        try:
            yield from range(9)
        finally:
            ended.append(True)

    drawn = InputStream(torch.device("cpu")).draw(source())
    assert next(drawn) == 0
    drawn.close()
    assert ended


def test_compiled_encoders_train_alike():
    trainee, train_step, _ = make_step(make_config())
    trainee.moco.encoder_q.compile(backend="eager", fullgraph=True)
    trainee.moco.encoder_k.compile(backend="eager", fullgraph=True)
    metrics = [float(train_step(share(step, 0, 1), step)["loss"]) for step in range(STEPS)]
    np.testing.assert_allclose(metrics, run_steps(0, 1, make_config())[1], rtol=1e-5)
    before = [p.detach().clone() for p in trainee.moco.encoder_k.parameters()]
    train_step(share(3, 0, 1), 3)  # the moving average moves under compile too
    assert any(not torch.equal(a, b) for a, b in zip(trainee.moco.encoder_k.parameters(), before))


def backward_in_ddp(rank, world_size):
    ranks = Ranks(rank, world_size, torch.device("cpu"))
    encoder = make_trainee(make_config(arch="resnet18", channels_last="off"), ranks).moco.encoder_q
    wrapped = wrap_ddp(encoder, ranks.device)
    wrapped(torch.randn(8, 3, 32, 32)).sum().backward()


def test_gradients_of_1x1_kernels_make_ddp_say_nothing():
    run_ranks(backward_in_ddp, 2)  # there warnings are errors


def test_accumulated_keys_enter_the_queue_as_those_of_one_batch():
    """2 ranks, 3 images each, in 3 parts: part p holds image p of rank 0, then of rank 1."""
    parts = [torch.tensor([[p], [10 + p]]) for p in range(3)]
    assert in_rank_order(parts, 2).flatten().tolist() == [0, 1, 2, 10, 11, 12]
