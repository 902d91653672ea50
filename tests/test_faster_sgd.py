"""apex's SGD: only NVIDIA's, only on a GPU, only where it is faster; its state is torch's."""

from __future__ import annotations

import copy
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from fastssl.build import make_trainee
from fastssl.config import Config, replace
from fastssl.describe_run import describe
from fastssl.distributed import Ranks
from fastssl.optim import load_optimizer_state, make_optimizer, set_lr
from fastssl.plan import make_plan
from fastssl.trials import faster_sgd
from fastssl.trials.faster_sgd import choose_sgd, import_apex_sgd, time_makers, torch_sgd, why_torch

CPU = Ranks(0, 1, torch.device("cpu"))
CUDA = torch.device("cuda")
CONFIG = replace(Config(), arch="resnet18", dim=8, queue_size=16, channels_last="on", device="cpu")


class FusedSGD(torch.optim.Optimizer):
    """What we know of apex's: its arguments, its state, its zero_grad without arguments; no fusion."""

    def __init__(self, params, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    def zero_grad(self) -> None:
        raise AssertionError("ours is called")

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                    buffer.mul_(group["momentum"]).add_(p.grad + group["weight_decay"] * p)
                    p.sub_(buffer, alpha=group["lr"])


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA's apex as if it were installed, on a machine as if it had a GPU."""
    modules = {name: ModuleType(name) for name in ("amp_C", "apex", "apex.optimizers")}
    modules["apex.optimizers"].FusedSGD = FusedSGD
    modules["amp_C"].__spec__ = object()  # what find_spec looks at
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(faster_sgd, "why_torch", lambda *_: "")


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))


def fresh(model: nn.Module) -> torch.optim.Optimizer:
    return make_optimizer(model, "sgd", lr=0.1, weight_decay=0.3, exclude_norm_bias=True)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        set_lr(optimizer, 0.1 / (step + 1))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def test_the_faster_one_is_taken_and_steps_as_the_other(apex: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    for seconds, whose in [(0.5, "ApexSGD"), (0.95, "SGD"), (2.0, "SGD")]:
        monkeypatch.setattr(faster_sgd, "time_makers", lambda *_, s=seconds: {"torch": 1e-3, "apex": s * 1e-3})
        optimizer, why = choose_sgd(CONFIG, fresh(model), CPU)
        assert type(optimizer).__name__ == whose
        assert why.startswith("apex's" if whose == "ApexSGD" else "torch's") and f"apex {seconds:.3g} ms" in why


def test_a_run_goes_on_from_either_ones_checkpoint(apex: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faster_sgd, "time_makers", lambda *_: {"torch": 2.0, "apex": 1.0})
    model = make_model()
    mixed = copy.deepcopy(model)
    always_torch = fresh(model)
    train(model, always_torch, range(9))
    state = None
    for turn, start in enumerate(range(0, 9, 3)):
        optimizer = fresh(mixed)
        if turn != 1:
            optimizer, _ = choose_sgd(CONFIG, optimizer, CPU)
        assert (type(optimizer) is torch.optim.SGD) == (turn == 1)
        if state is not None:
            load_optimizer_state(optimizer, state)
        train(mixed, optimizer, range(start, start + 3))
        state = copy.deepcopy(optimizer.state_dict())
    for p, q in zip(model.parameters(), mixed.parameters()):
        torch.testing.assert_close(p, q)
    with pytest.raises(ValueError, match="another optimizer or model"):
        load_optimizer_state(make_optimizer(model, "adamw", lr=0.1, weight_decay=0.3), state)


def test_a_measurement_leaves_weights_and_state_alone(apex: None) -> None:
    model = make_model()
    before, optimizer = copy.deepcopy(model.state_dict()), fresh(model)
    seconds = time_makers({"torch": torch_sgd, "apex": import_apex_sgd()[0]}, optimizer)
    assert seconds.keys() == {"torch", "apex"} and min(seconds.values()) > 0
    assert not optimizer.state and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_pypis_apex_is_not_mistaken_for_nvidias(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise AssertionError('not even imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "amp_C", raising=False)
    assert import_apex_sgd() == (None, "NVIDIA apex is not installed")


def test_an_apex_that_does_not_load_is_named(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "amp_C.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(faster_sgd, "why_torch", lambda *_: "")
    optimizer = fresh(make_model())
    chosen, why = choose_sgd(CONFIG, optimizer, CPU)
    assert chosen is optimizer and why == "torch's: apex does not load (ImportError: undefined symbol: _ZN3c10)"


@pytest.mark.parametrize(
    ("changes", "device", "reason"),
    [
        ({}, CPU.device, "no CUDA device"),
        ({"optimizer": "adamw"}, CUDA, "apex is not used for adamw"),
        ({"deterministic": True, "precision": "bf16"}, CUDA, "not measured in a deterministic run"),
        ({"precision": "fp16"}, CUDA, "with a gradient scaler apex would wait for the device"),
        ({"precision": "bf16"}, CUDA, ""),
    ],
)
def test_where_apex_is_not_tried(changes: dict[str, object], device: torch.device, reason: str) -> None:
    assert why_torch(replace(CONFIG, **changes), device) == reason


def test_the_log_says_whose_it_is() -> None:
    config = replace(CONFIG, loader="synthetic", batch_size=4, synthetic_images=4)
    trainee = make_trainee(config, CPU)

    class Loader:
        num_images, class_names, notices, name, reason = 4, (), (), "synthetic", "asked for"

    lines = describe(config, make_plan(config, 1), Loader(), trainee, CPU)
    assert lines[-1].endswith("sgd torch's: no CUDA device")
