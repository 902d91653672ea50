"""Optimizers against their formulas in float64, what they exclude, overflow under a scaler, and saved state."""

import copy

import pytest
import timm.optim.lars
import torch
from torch import nn

from fastssl.optim import NAMES, load_optimizer_state, make_optimizer, set_lr, supports_scaler_without_sync


def make_model(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5)).to(dtype)


def set_grads(model, seed):
    torch.manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn_like(p)


def sgd_step(w, g, state, lr, decay, momentum=0.9):
    g = g + decay * w
    state["v"] = momentum * state["v"] + g if "v" in state else g
    return w - lr * state["v"]


def adamw_step(w, g, state, lr, decay, betas=(0.9, 0.999)):
    state["t"] = t = state.get("t", 0) + 1
    state["m"] = betas[0] * state.get("m", 0) + (1 - betas[0]) * g
    state["v"] = betas[1] * state.get("v", 0) + (1 - betas[1]) * g * g
    m, v = state["m"] / (1 - betas[0] ** t), state["v"] / (1 - betas[1] ** t)
    return w * (1 - lr * decay) - lr * m / (v.sqrt() + 1e-8)


def lars_step(w, g, state, lr, decay, momentum=0.9, trust=0.001):
    if w.ndim > 1:  # one-dimensional parameters: plain momentum, no decay
        ratio = trust * w.norm() / (g.norm() + decay * w.norm())
        g = ratio * (g + decay * w)
    state["v"] = momentum * state["v"] + g if "v" in state else g
    return w - lr * state["v"]


STEPS = {"sgd": sgd_step, "adamw": adamw_step, "lars": lars_step}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_steps_follow_the_formula_with_a_changing_rate(name, exclude, decay):
    model = make_model()
    optimizer = make_optimizer(model, name, lr=0.1, weight_decay=decay, exclude_norm_bias=exclude)
    truth = [p.detach().clone() for p in model.parameters()]
    states = [{} for _ in truth]
    for step, lr in enumerate([0.1, 0.1, 0.03, 0.5]):
        set_lr(optimizer, lr)
        set_grads(model, step)
        for i, p in enumerate(model.parameters()):
            own_decay = 0.0 if exclude and p.ndim == 1 else decay
            truth[i] = STEPS[name](truth[i], p.grad, states[i], lr, own_decay)
        grads = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        if name != "lars" or hasattr(timm.optim.lars, "lars"):  # an older timm overwrites them; nobody reads them then
            assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads))
    for p, expected in zip(model.parameters(), truth):
        torch.testing.assert_close(p.detach(), expected, rtol=1e-7, atol=1e-9)


def test_frozen_parameters_are_left_out():
    model = make_model()
    model[0].requires_grad_(False)
    optimizer = make_optimizer(model, "sgd", lr=1.0, weight_decay=0.5)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for m in (model[1], model[3]) for p in m.parameters()}
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        make_optimizer(model[0], "sgd", lr=1.0, weight_decay=0.0)
    with pytest.raises(ValueError, match="unknown optimizer 'adam': choose one of sgd, adamw, lars"):
        make_optimizer(model, "adam", lr=1.0, weight_decay=0.0)


def test_only_vectors_or_only_matrices_make_one_group():
    for module in (nn.BatchNorm2d(3), nn.Linear(3, 3, bias=False)):
        for name in NAMES:
            assert len(make_optimizer(module, name, lr=1.0, weight_decay=0.1, exclude_norm_bias=True).param_groups) == 1


@pytest.mark.parametrize("name", NAMES)
def test_overflow_in_any_step_changes_nothing(name):
    """The very first step under fp16 usually overflows: neither weights nor momentum may notice."""
    model, twin = make_model(torch.float32), make_model(torch.float32)
    optimizer = make_optimizer(model, name, lr=0.1, weight_decay=0.1)
    plain = make_optimizer(twin, name, lr=0.1, weight_decay=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    scaler.scale(torch.ones(()))
    for step, overflow in enumerate([True, True, False, True, False]):
        junk = [torch.full_like(p, 1e9) for p in model.parameters() for _ in range(8)]
        del junk  # freed memory that an uninitialised buffer would find
        before = [p.detach().clone() for p in model.parameters()]
        set_grads(model, step)
        set_grads(twin, step)
        scale = scaler.get_scale()
        for p in model.parameters():
            p.grad.mul_(scale)
        if overflow:
            model[0].weight.grad[0, 0, 0, 0] = float("inf")
        else:
            plain.step()
        scaler.step(optimizer)
        scaler.update()
        assert overflow == all(torch.equal(p, b) for p, b in zip(model.parameters(), before))
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_which_optimizers_need_no_sync_under_a_scaler():
    model = make_model(torch.float32)
    support = {n: supports_scaler_without_sync(make_optimizer(model, n, lr=0.1, weight_decay=0.0)) for n in NAMES}
    assert support == {"sgd": True, "adamw": True, "lars": False}
    assert not supports_scaler_without_sync(torch.optim.SGD(model.parameters(), lr=0.1, fused=False))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps_before", [0, 3])
def test_saved_state_continues_bit_for_bit(name, steps_before, tmp_path):
    model = make_model(torch.float32)
    optimizer = make_optimizer(model, name, lr=0.1, weight_decay=0.1, exclude_norm_bias=True)
    for step in range(steps_before):
        set_grads(model, step)
        optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x.pt")
    saved = torch.load(tmp_path / "x.pt", weights_only=True)

    other = make_model(torch.float32, seed=9)
    other.load_state_dict(saved["model"])
    resumed = make_optimizer(other, name, lr=0.1, weight_decay=0.1, exclude_norm_bias=True)
    load_optimizer_state(resumed, saved["optimizer"])
    for p, q in zip(model.parameters(), other.parameters()):
        assert set(optimizer.state.get(p, {})) == set(resumed.state.get(q, {}))
        assert all(torch.equal(v, resumed.state[q][k]) for k, v in optimizer.state.get(p, {}).items())
    assert optimizer.state_dict()["param_groups"] == resumed.state_dict()["param_groups"]
    for step in range(10, 13):
        for m, o in ((model, optimizer), (other, resumed)):
            set_grads(m, step)
            o.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))


def test_state_does_not_depend_on_the_memory_format_it_was_saved_in():
    model = make_model(torch.float32)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, "sgd", lr=0.1, weight_decay=0.1)
    set_grads(model, 0)
    optimizer.step()
    last.load_state_dict(model.state_dict())
    resumed = make_optimizer(last, "sgd", lr=0.1, weight_decay=0.1)
    load_optimizer_state(resumed, optimizer.state_dict())
    set_grads(model, 1)
    for p, q in zip(model.parameters(), last.parameters()):
        q.grad = torch.empty_like(q).copy_(p.grad)
    assert last[0].weight.stride() != model[0].weight.stride()
    optimizer.step()
    resumed.step()
    for p, q in zip(model.parameters(), last.parameters()):
        torch.testing.assert_close(p, q)


def test_hyper_parameters_stay_those_of_the_configuration():
    model = make_model()
    old = make_optimizer(model, "sgd", lr=0.1, weight_decay=0.1)
    new = make_optimizer(model, "sgd", lr=0.7, weight_decay=0.2, momentum=0.5)
    load_optimizer_state(new, old.state_dict())
    group = new.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["momentum"], group["fused"]) == (0.7, 0.2, 0.5, True)


def test_foreign_state_is_refused_before_anything_changes():
    model = make_model()
    sgd = make_optimizer(model, "sgd", lr=0.1, weight_decay=0.1)
    set_grads(model, 0)
    sgd.step()
    wider = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, 5)).double()
    for other, message in [
        (make_optimizer(wider, "sgd", lr=0.1, weight_decay=0.1), r"momentum_buffer has shape \(4, 3, 3, 3\) for a"),
        (make_optimizer(model, "adamw", lr=0.1, weight_decay=0.1), "another optimizer or model"),
        (make_optimizer(model, "lars", lr=0.1, weight_decay=0.1), "another optimizer or model"),
        (make_optimizer(model[3], "sgd", lr=0.1, weight_decay=0.1), "another optimizer or model"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            load_optimizer_state(other, sgd.state_dict())
        assert "\n" not in str(error.value)
        assert not other.state


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu_it_steps_without_sync_and_follows_the_cpu(name):
    cpu = make_model(torch.float32)
    gpu = copy.deepcopy(cpu).cuda()
    optimizers = [make_optimizer(m, name, lr=0.1, weight_decay=0.1) for m in (cpu, gpu)]
    for step in range(3):
        set_grads(cpu, step)
        for p, q in zip(cpu.parameters(), gpu.parameters()):
            q.grad = p.grad.cuda()
        optimizers[0].step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            set_lr(optimizers[1], 0.1)
            optimizers[1].step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for p, q in zip(cpu.parameters(), gpu.parameters()):
        torch.testing.assert_close(p, q.cpu(), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_on_a_gpu_an_overflowing_first_step_changes_nothing_and_never_syncs(name):
    model = make_model(torch.float32).cuda()
    optimizer = make_optimizer(model, name, lr=0.1, weight_decay=0.1)
    scaler = torch.amp.GradScaler("cuda")
    scaler.scale(torch.ones((), device="cuda"))
    before = [p.detach().clone() for p in model.parameters()]
    set_grads(model, 0)
    model[0].weight.grad.fill_(float("inf"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        scaler.step(optimizer)
        scaler.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before))
    buffers = [v for s in optimizer.state.values() for k, v in s.items() if k != "step"]
    assert buffers and all((b == 0).all() for b in buffers)
