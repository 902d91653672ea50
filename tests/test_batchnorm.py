"""Split BN against plain BN on each sub-batch by itself: outputs, gradients, running statistics; and SyncBN's guard."""

import copy

import pytest
import torch
from torch import nn

from fastssl.models import convert_sync_batchnorm, make_encoder, make_head, split_batchnorm
from fastssl.models.batchnorm import take_counters


def run_replicas(model, x, grad_out, splits):
    """The truth: `splits` copies of the plain model, one sub-batch each. Returns what one model should have made of it:
    outputs in order, gradients summed, running statistics averaged, and the gradient of x."""
    outputs, grads, input_grads, buffers = [], [], [], []
    for part, grad in zip(x.tensor_split(splits), grad_out.tensor_split(splits)):
        replica, part = copy.deepcopy(model), part.clone().requires_grad_()
        out = replica(part)
        out.backward(grad)
        outputs.append(out.detach())
        input_grads.append(part.grad)
        grads.append([p.grad for p in replica.parameters()])
        buffers.append(dict(replica.named_buffers()))
    averages = {k: sum(b[k].double() for b in buffers) / splits for k in buffers[0]}
    return torch.cat(outputs), [sum(g) for g in zip(*grads)], torch.cat(input_grads), averages


def make_resnet():
    return make_encoder("resnet18", head="simple", dim=16).double()


def make_mlp():
    return nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 5), nn.BatchNorm1d(5)).double()


@pytest.mark.parametrize("make, shape", [(make_resnet, (16, 3, 32, 32)), (make_mlp, (12, 7))])
@pytest.mark.parametrize("splits", [2, 4])
@pytest.mark.parametrize("compiling", [False, True])
def test_equals_one_plain_model_per_sub_batch(make, shape, splits, compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    torch.manual_seed(splits)
    model = make()
    x = torch.randn(shape, dtype=torch.float64) * 2 + torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1))
    grad_out = torch.randn(shape[0], model(x[:4]).shape[1], dtype=torch.float64)
    outputs, grads, x_grad, buffers = run_replicas(model, x, grad_out, splits)
    counted = {k: v.clone() for k, v in model.named_buffers() if k.endswith("num_batches_tracked")}

    split = copy.deepcopy(model)
    split_batchnorm(split, splits)
    x_split = x.clone().requires_grad_()
    out = split(x_split)
    out.backward(grad_out)

    torch.testing.assert_close(out, outputs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x_split.grad, x_grad, rtol=1e-6, atol=1e-9)
    for p, grad in zip(split.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-6, atol=1e-9)
    for name, buffer in split.named_buffers():
        torch.testing.assert_close(buffer.double(), buffers[name], rtol=1e-9, atol=1e-12)
        if name in counted:
            assert buffer == counted[name] + 1
    # and it is not what one plain batch would give
    assert (model(x) - outputs).abs().max() > 1e-2


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("splits", [1, 2, 3, 5])
def test_running_statistics_are_the_mean_of_each_splits_own(momentum, splits):
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(3, momentum=momentum).double()
    split_batchnorm(bn, splits)
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    for step in range(3):
        x = torch.randn(30, 3, 2, 2).double() * (step + 1) + torch.arange(30).view(-1, 1, 1, 1)
        bn(x)
        parts = x.view(splits, 30 // splits, 3, 4).movedim(2, 1).reshape(splits, 3, -1)
        mean = (1 - momentum) * mean + momentum * parts.mean(2).mean(0)
        var = (1 - momentum) * var + momentum * parts.var(2, correction=1).mean(0)
    torch.testing.assert_close(bn.running_mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(bn.running_var, var, rtol=1e-12, atol=1e-12)
    assert bn.num_batches_tracked == 3


def test_eval_mode_and_checkpoints_are_plain():
    torch.manual_seed(0)
    plain = make_encoder("mobilenet_v3_small", dim=8)
    split = copy.deepcopy(plain)
    split_batchnorm(split, 4)
    split(torch.randn(8, 3, 32, 32))
    assert list(split.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(split.state_dict(), strict=True)
    x = torch.randn(3, 3, 32, 32)  # 3 is not divisible by 4: no matter in eval mode
    assert torch.equal(split.eval()(x), plain.eval()(x))


def test_conversion_is_in_place_repeatable_and_undone_by_one():
    torch.manual_seed(0)
    model = make_resnet().float()
    parameters = [id(p) for p in model.parameters()]
    layer = model.backbone.bn1
    x = torch.randn(8, 3, 32, 32)
    expected = copy.deepcopy(model)(x)
    split_batchnorm(model, 1)
    assert type(layer) is nn.BatchNorm2d
    split_batchnorm(model, 4)
    split_batchnorm(model, 2)
    assert model.backbone.bn1 is layer and layer.splits == 2
    assert [id(p) for p in model.parameters()] == parameters
    assert isinstance(copy.deepcopy(model).backbone.bn1, nn.BatchNorm2d)
    assert not torch.allclose(model(x), expected, atol=1e-3)
    split_batchnorm(model, 1)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("compiling", [False, True])
def test_channels_last_in_channels_last_out(compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(6)
    split_batchnorm(bn, 2)
    x = torch.randn(4, 6, 5, 3)
    expected = copy.deepcopy(bn)(x)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    out = bn(x)
    out.backward(torch.ones_like(out))
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("lacks", [["weight", "bias"], ["bias"], ["running_mean", "running_var"]])
@pytest.mark.parametrize("compiling", [False, True])
def test_layers_without_weights_or_statistics(lacks, compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(6).double()
    for name in lacks:
        setattr(bn, name, None)
    x, grad_out = torch.randn(2, 6, 6, 5, 3).double()
    outputs, grads, x_grad, buffers = run_replicas(bn, x, grad_out, 3)
    split_batchnorm(bn, 3)
    x.requires_grad_()
    out = bn(x)
    out.backward(grad_out)
    torch.testing.assert_close(out, outputs)
    torch.testing.assert_close(x.grad, x_grad)
    torch.testing.assert_close([p.grad for p in bn.parameters()], grads)
    torch.testing.assert_close({k: b.double() for k, b in bn.named_buffers()}, buffers)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_to_one_graph(backend):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), make_head("simple", 16, 5))
    split_batchnorm(model, 3)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    for _ in range(2):
        x = torch.randn(6, 3, 4, 4)
        out, expected = compiled(x), model(x)
        torch.testing.assert_close(out, expected)
        out.square().sum().backward()
        expected.square().sum().backward()
    for p, q in zip(twin.parameters(), model.parameters()):
        torch.testing.assert_close(p.grad, q.grad)
    for p, q in zip(twin.buffers(), model.buffers()):
        torch.testing.assert_close(p, q)
    assert twin[1].num_batches_tracked == 2


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("splits", [1, 2])
def test_counters_taken_count_in_the_state_dict_and_layers_leave_them_alone(compiled, splits):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.BatchNorm1d(16))
    before = list(model.state_dict())
    if splits > 1:
        split_batchnorm(model, splits)
    counters = take_counters(model)
    run = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
    for _ in range(2):
        run(torch.randn(6, 3, 4, 4))
    assert [c.item() for c in counters] == [0] * len(counters)
    torch._foreach_add_(counters, 2)
    state = model.state_dict()
    assert list(state) == before and all(state[f"{i}.num_batches_tracked"] == 2 for i in (1, 3))
    model.load_state_dict(state | {"1.num_batches_tracked": torch.tensor(7)})
    assert counters[0] == 7


def test_a_layer_that_needs_its_number_keeps_counting():
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=None), nn.BatchNorm1d(3, track_running_stats=False))
    assert take_counters(model) == []
    model(torch.randn(4, 3))
    assert model[0].num_batches_tracked == 1


def test_synchronised_layers_count_themselves():
    """SyncBatchNorm refuses to train without its number; alone it runs on a CPU too."""
    model = nn.SyncBatchNorm(3)
    assert take_counters(model) == []
    model(torch.randn(4, 3))
    assert model.num_batches_tracked == 1


def test_autocast_and_layers_without_affine_or_statistics():
    torch.manual_seed(0)
    x = torch.randn(6, 4, 3, 3)
    for options in ({"affine": False}, {"track_running_stats": False}):
        bn = nn.BatchNorm2d(4, **options)
        expected = torch.cat([copy.deepcopy(bn)(part) for part in x.tensor_split(3)])
        split_batchnorm(bn, 3)
        torch.testing.assert_close(bn(x), expected)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    split_batchnorm(model, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16 and model[1].running_mean.dtype == torch.float32


def test_misuse_is_one_clear_sentence():
    class OtherNorm(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    def refuse(module, splits, message):
        with pytest.raises(ValueError, match=message) as error:
            split_batchnorm(module, splits)
        assert "\n" not in str(error.value)

    refuse(nn.BatchNorm2d(3), 0, "at least 1 split, got 0")
    refuse(nn.Linear(3, 3), 2, "no batch normalisation to split")
    refuse(nn.Sequential(nn.BatchNorm2d(3), OtherNorm(3)), 2, "OtherNorm layer '1'")
    refuse(nn.Sequential(nn.SyncBatchNorm(3)), 2, "SyncBatchNorm layer '0'")
    refuse(nn.Sequential(nn.BatchNorm1d(3, momentum=None)), 2, "layer '0', whose momentum is None")
    mixed = nn.Sequential(nn.BatchNorm2d(3), OtherNorm(3))
    refuse(mixed, 2, "OtherNorm")
    assert type(mixed[0]) is nn.BatchNorm2d  # nothing half done
    split_batchnorm(nn.Sequential(nn.Linear(3, 3), OtherNorm(3)), 1)

    bn = nn.BatchNorm2d(3)
    split_batchnorm(bn, 4)
    with pytest.raises(ValueError, match=r"a batch of 6 cannot be split into 4 equal parts \(--bn-splits\)"):
        bn(torch.randn(6, 3, 2, 2))
    assert bn.num_batches_tracked == 0
    with pytest.raises(ValueError, match="expected 4D input"):
        bn(torch.randn(8, 3))


def test_sync_batchnorm_only_on_cuda_and_never_with_splits():
    cuda = torch.device("cuda", 0)
    model = make_encoder("resnet18")
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=r"^SyncBatchNorm needs CUDA, but this run is on cpu"):
        convert_sync_batchnorm(model, torch.device("cpu"))
    split_batchnorm(model, 2)
    with pytest.raises(ValueError, match="either split or synchronised"):
        convert_sync_batchnorm(model, cuda)
    split_batchnorm(model, 1)
    synced = convert_sync_batchnorm(model, cuda)
    kinds = [type(m) for m in synced.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(kinds) == 20 and set(kinds) == {nn.SyncBatchNorm}
    assert list(synced.state_dict()) == keys


@pytest.mark.gpu
def test_on_a_gpu_it_does_not_sync_and_equals_the_cpu():
    torch.manual_seed(0)
    cpu = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    split_batchnorm(cpu, 4)
    gpu = copy.deepcopy(cpu).cuda().to(memory_format=torch.channels_last)
    x = torch.randn(16, 3, 9, 9)
    x_gpu = x.cuda().contiguous(memory_format=torch.channels_last)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = gpu(x_gpu)
        out.square().mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = cpu(x)
    expected.square().mean().backward()
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-2, atol=1e-2)  # TF32 convolutions
    torch.testing.assert_close(gpu[1].running_var.cpu(), cpu[1].running_var, rtol=1e-2, atol=1e-3)
