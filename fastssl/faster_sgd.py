"""SGD by NVIDIA apex, where that is installed and faster than torch's own: measured at the start of a run on GPUs.

apex's FusedSGD makes torch's step from torch's state (`momentum_buffer`), so a checkpoint does not tell which of the
two wrote it. Its FusedAdam counts steps elsewhere, and neither takes torch's gradient scaler without making every step
wait for the device: AdamW and fp16 stay torch's. PyPI's package named apex is another project, without `amp_C`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from statistics import median

import torch
from torch.optim import Optimizer

from fastssl.config import Config
from fastssl.distributed import Ranks, broadcast_object, gather_objects
from fastssl.plan import choose_precision

MARGIN = 1.1  # how many times as fast apex must be: clocks are noisy, and restarts should choose alike
ROUNDS, STEPS = 5, 10
OPTIONS = ("lr", "momentum", "weight_decay")  # of a group


def choose_sgd(config: Config, optimizer: Optimizer, ranks: Ranks) -> tuple[Optimizer, str]:
    """torch's `optimizer`, which has made no step, or apex's for the same parameters; and why in a few words.

    The same on every rank; call on all of them. A measurement changes neither parameters nor state.
    """
    if reason := why_torch(config, ranks.device):
        return optimizer, f"torch's: {reason}"
    make_apex, reason = import_apex_sgd()
    if reason := next(filter(None, gather_objects(reason, ranks)), ""):  # of any rank
        return optimizer, f"torch's: {reason}"
    makers = {"torch": torch_sgd, "apex": make_apex}
    seconds = broadcast_object(time_makers(makers, optimizer), ranks)
    told = ", ".join(f"{name} {1e3 * s:.3g} ms" for name, s in seconds.items())
    if seconds["apex"] * MARGIN >= seconds["torch"]:
        return optimizer, f"torch's, measured at the start: {told}"
    return make_apex(copy_groups(optimizer, lambda p: p)), f"apex's, measured at the start: {told}"


def why_torch(config: Config, device: torch.device) -> str:
    """What speaks against trying apex, or ""."""
    if config.optim.optimizer != "sgd":
        return f"apex is not used for {config.optim.optimizer}"
    if device.type != "cuda":
        return "no CUDA device"
    if config.train.deterministic:
        return "no clock decides a deterministic run"
    if choose_precision(config.train.precision, device) == "fp16":
        return "with a gradient scaler apex would wait for the device"
    return ""


def import_apex_sgd() -> tuple[Callable[[list[dict]], Optimizer] | None, str]:
    """(groups -> apex's SGD, "") or (None, why there is none)."""
    if find_spec("amp_C") is None:
        return None, "NVIDIA apex is not installed"
    try:
        import amp_C  # noqa: F401 (the compiled part: what does not load is to be known now)
        from apex.optimizers import FusedSGD
    except Exception as error:  # built for another torch or CUDA, it may raise anything
        return None, f"apex does not load ({type(error).__name__}: {' '.join(str(error).split())[:100]})"
    # its own zero_grad takes no set_to_none
    kind = type("ApexSGD", (FusedSGD,), {"zero_grad": Optimizer.zero_grad})
    return lambda groups: kind(groups, **{name: groups[0][name] for name in OPTIONS}), ""


def torch_sgd(groups: list[dict]) -> Optimizer:
    """torch's, as `fastssl.optim` makes it."""
    return torch.optim.SGD(groups, **{name: groups[0][name] for name in OPTIONS}, fused=True)


def copy_groups(optimizer: Optimizer, copy: Callable[[torch.Tensor], torch.Tensor]) -> list[dict]:
    """The optimizer's groups with `copy` of each parameter."""
    return [
        {"params": list(map(copy, group["params"])), **{name: group[name] for name in OPTIONS}}
        for group in optimizer.param_groups
    ]


def time_makers(makers: dict[str, Callable[[list[dict]], Optimizer]], optimizer: Optimizer) -> dict[str, float]:
    """Seconds of a step of each, in turn, on copies of the parameters in their memory formats."""

    def with_gradient(parameter: torch.Tensor) -> torch.Tensor:
        copy = parameter.detach().clone()
        copy.grad = torch.zeros_like(copy)
        return copy

    contestants = {name: make(copy_groups(optimizer, with_gradient)) for name, make in makers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for turn in range(-1, ROUNDS):  # the first one makes the state, and does not count
        for name, contestant in contestants.items():
            start = time.perf_counter()
            for _ in range(STEPS):
                contestant.step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name] += [(time.perf_counter() - start) / STEPS] * (turn >= 0)
    return {name: median(times) for name, times in seconds.items()}
