"""SGD from NVIDIA apex, where it is installed and faster than torch's own: measured at the start of a run on GPUs.

apex's FusedSGD does the same step on the same state (`momentum_buffer`), so checkpoints are interchangeable. AdamW and
fp16 always use torch's: apex's FusedAdam keeps its step count elsewhere, and with torch's gradient scaler both of
apex's optimizers make every step wait for the device. (PyPI's `apex` is another project, without `amp_C`.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch.optim import Optimizer

from fastssl.config import Config
from fastssl.distributed import Ranks, broadcast_object, gather_objects
from fastssl.machine.precision import choose_precision
from fastssl.trials.encoder_timing import time_iterations

MARGIN = 1.1  # apex must be this many times as fast: timings are noisy, and a restart should choose the same
ROUNDS, STEPS = 5, 10
OPTIONS = ("lr", "momentum", "weight_decay")  # of a parameter group


def choose_sgd(config: Config, optimizer: Optimizer, ranks: Ranks) -> tuple[Optimizer, str]:
    """torch's fresh `optimizer` or apex's for the same parameters, and whose it is and why, in a few words.

    Call on all ranks; all get the same answer. Measuring changes neither the parameters nor the state.
    """
    if reason := why_torch(config, ranks.device):
        return optimizer, f"torch's: {reason}"
    make_apex, reason = import_apex_sgd()
    if reasons := [reason for reason in gather_objects(reason, ranks) if reason]:
        return optimizer, f"torch's: {reasons[0]}"
    makers = {"torch": torch_sgd, "apex": make_apex}
    seconds = broadcast_object(time_makers(makers, optimizer), ranks)
    measured = f"measured at the start: torch {1e3 * seconds['torch']:.3g} ms, apex {1e3 * seconds['apex']:.3g} ms"
    if seconds["apex"] * MARGIN >= seconds["torch"]:
        return optimizer, f"torch's, {measured}"
    return make_apex(copy_groups(optimizer, lambda p: p)), f"apex's, {measured}"


def why_torch(config: Config, device: torch.device) -> str:
    """Why apex is not tried, or ""."""
    if config.optim.optimizer != "sgd":
        return f"apex is not used for {config.optim.optimizer}"
    if device.type != "cuda":
        return "no CUDA device"
    if config.train.deterministic:
        return "not measured in a deterministic run"
    if choose_precision(config.train.precision, device) == "fp16":
        return "with a gradient scaler apex would wait for the device"
    return ""


def import_apex_sgd() -> tuple[Callable[[list[dict]], Optimizer] | None, str]:
    """(groups -> apex's SGD, "") or (None, why there is none)."""
    if find_spec("amp_C") is None:
        return None, "NVIDIA apex is not installed"
    try:
        import amp_C  # noqa: F401 (the compiled part, to find out now whether it loads)
        from apex.optimizers import FusedSGD
    except Exception as error:  # built for another torch or CUDA, it may raise anything
        return None, f"apex does not load ({type(error).__name__}: {' '.join(str(error).split())[:100]})"

    class ApexSGD(FusedSGD):
        zero_grad = Optimizer.zero_grad  # apex's own takes no set_to_none

    return lambda groups: ApexSGD(groups, **{name: groups[0][name] for name in OPTIONS}), ""


def torch_sgd(groups: list[dict]) -> Optimizer:
    """torch's SGD, as `fastssl.optim` makes it."""
    return torch.optim.SGD(groups, **{name: groups[0][name] for name in OPTIONS}, fused=True)


def copy_groups(optimizer: Optimizer, copy: Callable[[torch.Tensor], torch.Tensor]) -> list[dict]:
    """The optimizer's parameter groups, with `copy` applied to each parameter."""
    return [
        {"params": [copy(p) for p in group["params"]], **{name: group[name] for name in OPTIONS}}
        for group in optimizer.param_groups
    ]


def time_makers(makers: dict[str, Callable[[list[dict]], Optimizer]], optimizer: Optimizer) -> dict[str, float]:
    """Seconds of a step of each maker's optimizer, timed in turn on copies of the parameters with zero gradients."""

    def with_gradient(parameter: torch.Tensor) -> torch.Tensor:
        copy = parameter.detach().clone()
        copy.grad = torch.zeros_like(copy)
        return copy

    def run_steps(timed: Optimizer) -> None:
        for _ in range(STEPS):
            timed.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    optimizers = {name: make(copy_groups(optimizer, with_gradient)) for name, make in makers.items()}
    seconds = time_iterations({name: partial(run_steps, timed) for name, timed in optimizers.items()}, rounds=ROUNDS)
    return {name: total / STEPS for name, total in seconds.items()}
