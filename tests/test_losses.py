"""The loss against the published formulas in float64, at the unnormalised projection, and its refusals."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from fastssl.bench.loss import peak_extra_bytes
from fastssl.losses import LossConfig, check_loss_inputs, choose_kernel, moco_loss
from fastssl.machine import triton_device

ALL_ON = {"contrast_weight": 0.7, "align_weight": 1.3, "uniform_weight": 0.9}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where the Triton kernel runs: compiled or interpreted
IMPLEMENTATIONS = ("auto", "reference", "triton")


def device_of(kernel):
    return DEVICE if kernel == "triton" else "cpu"


def make_projections(n, k, d, kernel, seed=0, peaked=False):
    """(z_q, z_k, queue): float32 projections before normalisation and a unit-row queue, where the kernel runs."""
    generator = torch.Generator().manual_seed(seed)
    z_q = torch.randn(n, d, generator=generator) * 3
    z_k = z_q + 2 * torch.randn(n, d, generator=generator)
    queue = torch.randn(k, d, generator=generator)
    if peaked:  # near-duplicates of queries, as instances seen again an epoch later
        rows = torch.randperm(k, generator=generator)[: n // 2]
        queue[rows] = z_q[: len(rows)] + 0.1 * torch.randn(len(rows), d, generator=generator)
    return tuple(x.to(device_of(kernel)) for x in (z_q, z_k, F.normalize(queue, dim=1)))


def published_terms(z_q, z_k, queue, config):
    """Contrast, align and uniform in float64, written pair by pair from the papers, independent of the project."""
    q, k, queue = (F.normalize(x.double(), dim=1) for x in (z_q, z_k, queue))
    n = q.shape[0]
    exponent = [(q[i] @ torch.stack([k[i], *queue]).T) / config.temperature for i in range(n)]
    contrast = torch.stack([e.logsumexp(0) - e[0] for e in exponent]).mean()
    align = torch.stack([torch.dist(q[i], k[i]) ** config.align_alpha for i in range(n)]).mean()
    pairs = [((q[i] - queue) ** 2).sum(1) for i in range(n)]
    if config.intra_batch:
        i, j = torch.triu_indices(n, n, offset=1)
        pairs.append(((q[i] - q[j]) ** 2).sum(1))
    uniform = (-config.uniform_t * torch.cat(pairs)).exp().mean().log()
    return contrast, align, uniform


def loss_and_gradient(z_q, z_k, queue, config, kernel):
    z_q = z_q.clone().requires_grad_()
    loss = moco_loss(F.normalize(z_q, dim=1), F.normalize(z_k, dim=1), queue, config, kernel)
    (gradient,) = torch.autograd.grad(loss.total, z_q)
    return loss, gradient


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
@pytest.mark.parametrize("intra_batch", [True, False])
@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("n", [1, 2, 8, 100])
def test_matches_the_published_formulas_in_float64(n, alpha, intra_batch, kernel):
    z_q, z_k, queue = make_projections(n, 777, 128, kernel, seed=n, peaked=True)
    config = LossConfig(**ALL_ON, align_alpha=alpha, intra_batch=intra_batch)
    truth_z = z_q.double().requires_grad_()
    contrast, align, uniform = published_terms(truth_z, z_k, queue, config)
    truth = 0.7 * contrast + 1.3 * align + 0.9 * uniform
    (truth_gradient,) = torch.autograd.grad(truth, truth_z)

    loss, gradient = loss_and_gradient(z_q, z_k, queue, config, kernel)
    assert loss.total.dtype == torch.float32
    for value, wanted in zip(loss[:4], (truth, contrast, align, uniform)):
        assert abs(value.double() - wanted) <= 1e-6 * max(1.0, abs(wanted))
    assert (gradient.double() - truth_gradient).abs().max() <= 1e-6


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
@pytest.mark.parametrize("term", ["contrast", "align", "uniform"])
def test_each_term_alone(term, kernel):
    z_q, z_k, queue = make_projections(9, 131, 32, kernel)
    weights = {f"{name}_weight": 2.5 * (name == term) for name in ("contrast", "align", "uniform")}
    config = LossConfig(**weights)
    truth_z = z_q.double().requires_grad_()
    truth = 2.5 * published_terms(truth_z, z_k, queue, config)[["contrast", "align", "uniform"].index(term)]
    (truth_gradient,) = torch.autograd.grad(truth, truth_z)
    loss, gradient = loss_and_gradient(z_q, z_k, queue, config, kernel)
    assert {name for name in ("contrast", "align", "uniform") if getattr(loss, name) is not None} == {term}
    assert (loss.top1 is not None) == (loss.top5 is not None) == (term == "contrast")
    torch.testing.assert_close(loss.total.double(), truth.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), truth_gradient, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 7), (5, 33), (64, 1000)])
def test_closed_forms_when_all_features_are_equal(n, k, kernel):
    row = F.normalize(torch.arange(1.0, 65, device=device_of(kernel))[None], dim=1)
    q = row.expand(n, -1).contiguous().requires_grad_()
    loss = moco_loss(q, row.expand(n, -1).contiguous(), row.expand(k, -1).contiguous(), LossConfig(**ALL_ON), kernel)
    # q.k and q.queue may be rounded in other orders, and the temperature magnifies that
    assert loss.contrast.item() == pytest.approx(math.log(k + 1), rel=1e-6, abs=1e-6)
    assert loss.align.item() == pytest.approx(0, abs=1e-6)
    assert loss.uniform.item() == pytest.approx(0, abs=2e-6)
    assert loss.top1.item() == loss.top5.item() == 100  # no queue row is nearer than the key
    loss.total.backward()
    assert q.grad.isfinite().all()


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_antipodal_queue(kernel):
    row = F.normalize(torch.arange(1.0, 33, device=device_of(kernel))[None], dim=1)
    loss = moco_loss(row, row, -row.expand(9, -1).contiguous(), LossConfig(**ALL_ON, temperature=0.2), kernel)
    assert loss.uniform.item() == pytest.approx(-4 * 3, rel=1e-6)  # d^2 = 4 for every pair
    assert loss.contrast.item() == pytest.approx(9 * math.exp(-2 / 0.2), rel=1e-2)


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5, 2.0, 3.0])
def test_identical_pairs_have_a_defined_gradient(alpha, kernel):
    z_q, z_k, queue = make_projections(4, 50, 32, kernel)
    z_k[:2] = z_q[:2]
    _, gradient = loss_and_gradient(z_q, z_k, queue, LossConfig(align_alpha=alpha, uniform_weight=0.0), kernel)
    assert (gradient[:2] == 0).all()
    assert gradient[2:].isfinite().all() and (gradient[2:] != 0).any()


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("damaged", [0, 1])  # q or k
def test_nan_in_one_row_is_seen(damaged, alpha, kernel):
    rows = make_projections(6, 50, 32, kernel)
    rows[damaged][2, 3] = torch.nan
    for uniform_weight in (0.0, 1.0):
        config = LossConfig(align_alpha=alpha, uniform_weight=uniform_weight)
        loss, gradient = loss_and_gradient(*rows, config, kernel)
        assert loss.total.isnan() and loss.align.isnan() and gradient[2].isnan().all()


@pytest.mark.parametrize("term", ["contrast", "uniform"])
def test_second_derivatives_are_right_or_refused(term):
    """The fast paths keep the gradient as a constant, whose own derivative would silently be missing."""
    config = LossConfig(**{"align_weight": 0.0, "uniform_weight": 0.0, f"{term}_weight": 1.0})

    def penalty(kernel):
        z_q, z_k, queue = (x.to(device_of(kernel)) for x in make_projections(4, 20, 32, kernel))
        z_q = z_q.double() if kernel == "reference" else z_q

        def norm(z):
            loss = moco_loss(F.normalize(z, dim=1), F.normalize(z_k, dim=1), queue, config, kernel)
            return torch.autograd.grad(loss.total, z, create_graph=True)[0].square().sum()

        return norm, z_q.requires_grad_()

    norm, z = penalty("reference")
    try:
        assert torch.autograd.gradcheck(norm, z)
    except NotImplementedError as refused:  # torch 2.11 cannot derive pdist twice, and says so
        assert "_pdist_backward" in str(refused)
    for kernel in ("auto", "triton"):
        norm, z = penalty(kernel)
        with pytest.raises(RuntimeError, match=r"differentiated twice \(create_graph\): use --loss-kernel reference"):
            norm(z)


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # by torch itself
def test_forward_mode_is_right_or_refused(kernel):
    """Torch drops the tangent of q in an operator that has a backward alone."""
    config = LossConfig(contrast_weight=1.0, intra_batch=False)  # pdist has no derivative in forward mode
    z_q, z_k, queue = make_projections(4, 20, 32, kernel)
    q, k, tangent = F.normalize(z_q, dim=1), F.normalize(z_k, dim=1), torch.ones_like(z_q)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, tangent)
        if kernel != "reference":
            with pytest.raises(RuntimeError, match=r"no forward-mode derivative .*use --loss-kernel reference"):
                moco_loss(dual, k, queue, config, kernel)
            return
        found = forward_ad.unpack_dual(moco_loss(dual, k, queue, config, kernel).total).tangent
    (gradient,) = torch.autograd.grad(moco_loss(q.requires_grad_(), k, queue, config, kernel).total, q)
    torch.testing.assert_close(found, gradient.sum())


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_identical_queries_and_no_pairs_are_defined(kernel):
    z_q, z_k, queue = make_projections(1, 50, 32, kernel)
    loss, gradient = loss_and_gradient(z_q, z_k, queue, LossConfig(), kernel)
    without, _ = loss_and_gradient(z_q, z_k, queue, LossConfig(intra_batch=False), kernel)
    assert loss.total == without.total and gradient.isfinite().all()
    loss, gradient = loss_and_gradient(z_q.expand(6, -1), z_k.expand(6, -1), queue, LossConfig(), kernel)
    assert loss.total.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_accuracy_counts_queue_rows_nearer_than_the_key(kernel):
    angle = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])  # the queue's distance from q, rising
    queue = torch.zeros(6, 32)
    queue[:, 0], queue[:, 1] = angle.cos(), angle.sin()
    q = torch.zeros(4, 32)
    q[:, 0] = 1
    k = torch.zeros(4, 32)
    key_angle = torch.tensor([0.05, 0.15, 0.45, 0.55])  # 0, 1, 4 and 5 queue rows are nearer
    k[:, 0], k[:, 1] = key_angle.cos(), key_angle.sin()
    q, k, queue = (x.to(device_of(kernel)) for x in (q, k, queue))
    loss = moco_loss(q, k, queue, LossConfig(contrast_weight=1.0), kernel)
    assert (loss.top1.item(), loss.top5.item()) == (25.0, 75.0)
    assert loss.top1.dtype == torch.float32


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
@pytest.mark.parametrize("queue_dtype", [torch.float32, torch.float16])
def test_queue_is_neither_changed_nor_needed_after_the_forward(queue_dtype, kernel):
    z_q, z_k, queue = make_projections(12, 301, 64, kernel)
    queue = queue.to(queue_dtype)
    config = LossConfig(**ALL_ON)
    _, wanted = loss_and_gradient(z_q, z_k, queue, config, kernel)
    before, version = queue.clone(), queue._version
    leaf = z_q.clone().requires_grad_()
    loss = moco_loss(F.normalize(leaf, dim=1), F.normalize(z_k, dim=1), queue, config, kernel)
    assert torch.equal(queue, before) and queue._version == version
    queue.fill_(torch.nan)  # the step's enqueue comes before the backward
    loss.total.backward()
    assert torch.equal(leaf.grad, wanted)


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_upstream_gradient_is_honoured_and_parts_hold_no_graph(kernel):
    z_q, z_k, queue = make_projections(6, 75, 32, kernel)
    leaf = z_q.clone().requires_grad_()
    loss = moco_loss(F.normalize(leaf, dim=1), F.normalize(z_k, dim=1), queue, LossConfig(**ALL_ON), kernel)
    (plain,) = torch.autograd.grad(loss.total, leaf, retain_graph=True)
    (scaled,) = torch.autograd.grad(-2.5 * loss.total, leaf)
    torch.testing.assert_close(scaled, -2.5 * plain, rtol=1e-5, atol=1e-8)
    assert not any(part.requires_grad for part in loss[1:])
    mix = 0.7 * loss.contrast + 1.3 * loss.align + 0.9 * loss.uniform
    torch.testing.assert_close(loss.total.detach(), mix, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_only_q_has_a_gradient(kernel):
    z_q, z_k, queue = make_projections(3, 20, 32, kernel)
    q, k, queue = (x.requires_grad_() for x in (F.normalize(z_q, dim=1), F.normalize(z_k, dim=1), queue))
    moco_loss(q, k, queue, LossConfig(**ALL_ON), kernel).total.backward()
    assert q.grad is not None and k.grad is None and queue.grad is None


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_autocast_changes_nothing(kernel):
    z_q, z_k, queue = make_projections(16, 200, 64, kernel)
    plain, plain_gradient = loss_and_gradient(z_q, z_k, queue, LossConfig(**ALL_ON), kernel)
    leaf = z_q.clone().requires_grad_()
    q, k = F.normalize(leaf, dim=1), F.normalize(z_k, dim=1)
    with torch.autocast(q.device.type, dtype=torch.bfloat16):
        cast = moco_loss(q, k, queue, LossConfig(**ALL_ON), kernel)
    cast.total.backward()
    assert cast == plain and torch.equal(leaf.grad, plain_gradient)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_queries_are_widened(dtype):
    z_q, z_k, queue = make_projections(8, 90, 64, "auto")
    q, k = F.normalize(z_q, dim=1).to(dtype).requires_grad_(), F.normalize(z_k, dim=1).to(dtype)
    loss = moco_loss(q, k, queue, LossConfig(**ALL_ON))
    wide = moco_loss(q.detach().float(), k.float(), queue, LossConfig(**ALL_ON))
    assert loss.total.dtype == torch.float32 and loss.total == wide.total
    loss.total.backward()
    assert q.grad.dtype == dtype


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_keys_may_have_another_dtype(kernel):
    z_q, z_k, queue = make_projections(8, 90, 64, kernel)
    q, k = F.normalize(z_q, dim=1), F.normalize(z_k, dim=1)
    for dtype in (torch.float16, torch.float64):
        loss = moco_loss(q, k.to(dtype), queue, LossConfig(**ALL_ON), kernel)
        assert loss == moco_loss(q, k.to(dtype).float(), queue, LossConfig(**ALL_ON), kernel)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"align_alpha": -1.0}, "align_alpha"),
        ({"uniform_t": 0.0}, "uniform_t"),
        ({"uniform_t": 50.0}, "uniform_t"),
        ({"uniform_weight": -1.0}, "uniform_weight"),
        ({"contrast_weight": float("inf")}, "contrast_weight"),
        ({"align_weight": 0.0, "uniform_weight": 0.0}, "positive weight"),
    ],
)
def test_config_refuses_what_makes_no_sense(fields, named):
    with pytest.raises(ValueError, match=named):
        LossConfig(**fields)


def unit(*shape, dtype=torch.float32):
    return F.normalize(torch.randn(*shape), dim=1).to(dtype)


@pytest.mark.parametrize(
    ("q", "k", "queue", "words"),
    [
        (unit(4, 32), unit(4, 32), unit(9, 64), r"with the D of q.*\(4, 32\).*\(9, 64\)"),
        (unit(4, 32), unit(5, 32), unit(9, 32), r"both be \(N, D\).*\(5, 32\)"),
        (unit(4, 32)[0], unit(4, 32)[0], unit(9, 32), r"both be \(N, D\)"),
        (unit(4, 32), unit(4, 32), unit(9, 32)[:0], r"queue is empty.*at least one.*\(0, 32\)"),
        (unit(4, 32)[:0], unit(4, 32)[:0], unit(9, 32), r"at least one.*\(0, 32\)"),
        (unit(4, 32), unit(4, 32), unit(32, 9).T, r"queue is not contiguous.*\(9, 32\)"),
        (unit(32, 4).T, unit(4, 32), unit(9, 32), r"q is not contiguous.*\(4, 32\)"),
        (unit(4, 32), unit(4, 32), unit(9, 32).long(), r"queue must be a floating-point"),
        (unit(4, 32), unit(4, 32), unit(9, 32).to("meta"), r"queue on meta.*one device"),
    ],
)
def test_bad_tensors_are_refused_with_shapes_and_the_mend(q, k, queue, words):
    with pytest.raises(ValueError, match=words):
        moco_loss(q, k, queue, LossConfig())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_unit_rows_pass_the_value_check(dtype):
    check_loss_inputs(unit(50, 128), unit(50, 128), unit(500, 128, dtype=dtype))


@pytest.mark.parametrize("name", ["q", "k", "queue"])
@pytest.mark.parametrize("damage", [1.01, 0.0, float("nan"), float("inf")])
def test_rows_that_are_not_unit_are_named(name, damage):
    tensors = {"q": unit(4, 32), "k": unit(4, 32), "queue": unit(9, 32)}
    tensors[name][2] *= damage
    with pytest.raises(ValueError, match=rf"^1 of \d rows of {name} .*row 2 .*normalize"):
        check_loss_inputs(**tensors)


def train_for_fifty_steps(kernel):
    """The loss curve of a linear encoder that must learn which half of its input is noise.

    The queue is overwritten between forward and backward, as a step may do.
    """
    device, generator = device_of(kernel), torch.Generator().manual_seed(0)
    images = torch.randn(64, 24, generator=generator)
    images[:, 12:] *= 0.1
    noisy = torch.tensor([0.0, 1.0]).repeat_interleave(12)

    def view(index):
        return (images[index] + noisy * torch.randn(len(index), 24, generator=generator)).to(device)

    weights = (0.3 * torch.randn(24, 32, generator=generator)).to(device).requires_grad_()
    queue = F.normalize(view(torch.arange(48)) @ weights.detach(), dim=1)
    config = LossConfig(contrast_weight=1.0, temperature=0.1)
    losses = []
    for step in range(50):
        index = torch.randperm(64, generator=generator)[:8]
        k = F.normalize(view(index) @ weights.detach(), dim=1)
        loss = moco_loss(F.normalize(view(index) @ weights, dim=1), k, queue, config, kernel).total
        queue[(8 * step) % 48 :][:8] = k
        (gradient,) = torch.autograd.grad(loss, weights)
        weights.data -= 0.1 * gradient
        losses.append(loss.detach().cpu())
    return torch.stack(losses)


def test_training_follows_the_same_curve_with_and_without_kernels():
    reference = train_for_fifty_steps("reference")
    assert reference[-5:].mean() < reference[:5].mean() - 2  # it learns
    for kernel in ("auto", "triton"):
        torch.testing.assert_close(train_for_fifty_steps(kernel), reference, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_without_a_graph_break(dynamic, kernel):
    config = LossConfig(**ALL_ON)

    def loss_of(z_q, z_k, queue):
        return moco_loss(F.normalize(z_q, dim=1), F.normalize(z_k, dim=1), queue, config, kernel)

    # the compiler traces a Triton kernel for a GPU only; fullgraph alone forbids graph breaks
    backend = "eager" if kernel == "triton" and DEVICE == "cpu" else "aot_eager"
    compiled_loss_of = torch.compile(loss_of, fullgraph=True, backend=backend, dynamic=dynamic)
    for n in (13, 8):  # the compiler takes a number that changes for a symbol
        z_q, *others = make_projections(n, 150, 32, kernel)
        z, compiled_z = z_q.clone().requires_grad_(), z_q.clone().requires_grad_()
        loss, compiled = loss_of(z, *others), compiled_loss_of(compiled_z, *others)
        torch.testing.assert_close(compiled, loss)
        loss.total.backward()
        compiled.total.backward()
        torch.testing.assert_close(compiled_z.grad, z.grad)


@pytest.mark.gpu
def test_compiles_on_a_gpu_and_waits_for_nothing():
    z_q, z_k, queue = make_projections(256, 4096, 128, "triton")
    queue = queue.bfloat16()

    def loss_of(z):
        return moco_loss(F.normalize(z, dim=1), F.normalize(z_k, dim=1), queue, LossConfig(**ALL_ON))

    eager, compiled = loss_of(z_q), torch.compile(loss_of, fullgraph=True)(z_q)
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_and_gradient(z_q, z_k, queue, LossConfig(**ALL_ON), "auto")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def gradient_call(kernel, queue_size):
    z_q, z_k, queue = make_projections(256, queue_size, 128, "auto")
    q, k = F.normalize(z_q, dim=1).requires_grad_(), F.normalize(z_k, dim=1)
    return lambda: torch.autograd.grad(moco_loss(q, k, queue, LossConfig(**ALL_ON), kernel).total, q)


def test_cpu_path_takes_a_tenth_of_the_memory():
    cpu, eager, ours = torch.device("cpu"), gradient_call("reference", 65536), gradient_call("auto", 65536)
    assert peak_extra_bytes(eager, cpu) >= 10 * peak_extra_bytes(ours, cpu)


def test_memory_is_measured_in_silence(capfd):
    peak_extra_bytes(lambda: torch.ones(3), torch.device("cpu"))
    assert capfd.readouterr().err == ""  # torch's profiler tells when it starts, and that it finds no GPU


def test_cpu_memory_does_not_grow_with_the_queue():
    small, large = (peak_extra_bytes(gradient_call("auto", size), torch.device("cpu")) for size in (8192, 32768))
    assert large <= 1.01 * small


def test_gradients_of_the_algebra_are_those_of_finite_differences():
    z_q, z_k, queue = (x.double() for x in make_projections(3, 11, 4, "auto"))

    def total(z):
        return moco_loss(F.normalize(z, dim=1), F.normalize(z_k, dim=1), queue, LossConfig(**ALL_ON)).total

    assert torch.autograd.gradcheck(total, z_q.requires_grad_())


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_choice_of_kernel_is_explained(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton_device, "start_obstacle", lambda: None)
    assert choose_kernel(CPU, torch.float32, 128) == ("tiled", "no CUDA device")
    assert choose_kernel(CUDA, torch.bfloat16, 128)[0] == "triton"
    assert choose_kernel(CUDA, torch.bfloat16, 100) == ("tiled", "D = 100 is not one of 32, 64, 128, 256")
    assert choose_kernel(CUDA, torch.float64, 128) == ("tiled", "no kernel for torch.float64")
    assert choose_kernel(CUDA, torch.float32, 128, "auto", 0.01) == ("reference", "temperature 0.01 is below 1/75")
    assert choose_kernel(CUDA, torch.float32, 128, "tiled", 0.07) == ("tiled", "requested")
    assert choose_kernel(CUDA, torch.float32, 128, "reference") == ("reference", "requested")
    for requested, device, dim, temperature, words in [
        ("cuda", CPU, 128, None, "unknown loss kernel 'cuda': choose one of auto"),
        ("triton", CPU, 128, None, "cannot run .no CUDA device.: use --loss-kernel auto"),
        ("triton", CUDA, 96, 0.07, "cannot run .D = 96 is not one of"),
        ("triton", CUDA, 128, 0.01, "triton loss kernel cannot run .temperature 0.01 is below 1/75"),
        ("tiled", CPU, 128, 0.01, "tiled loss kernel cannot run .temperature 0.01 is below 1/75"),
    ]:
        with pytest.raises(ValueError, match=words):
            choose_kernel(device, torch.float32, dim, requested, temperature)
    monkeypatch.setattr(triton_device, "start_obstacle", lambda: "Triton cannot start")
    assert choose_kernel(CUDA, torch.bfloat16, 128) == ("tiled", "Triton cannot start")


def test_sharp_temperature_takes_the_plain_formulas():
    z_q, z_k, queue = make_projections(5, 40, 32, "auto")
    config = LossConfig(contrast_weight=1.0, temperature=0.005)
    truth = published_terms(z_q, z_k, queue, config)[0]
    loss, gradient = loss_and_gradient(z_q, z_k, queue, config, "auto")
    assert loss.contrast.item() == pytest.approx(truth.item(), rel=1e-5) and gradient.isfinite().all()
