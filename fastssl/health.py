"""Notices a run gone bad without making the step wait: a loss that is not finite, features that are all the same."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastssl.command import NOT_FINITE
from fastssl.distributed import Ranks, gather_objects
from fastssl.plural import counted

REMEDY = "use a lower --lr, --warmup-epochs or --clip-grad"
ADVICE = f"{REMEDY}; earlier checkpoints are good"
COLLAPSED = 0.1  # a feature_std; encoders with random weights have 0.3 and more


class NonFiniteLoss(ValueError):
    """The loss became NaN or infinite; nothing has been saved since."""

    exit_code = NOT_FINITE


class Health:
    """The first step whose loss was not finite, its values and the last spread, on the device until someone asks.

    `settled`: the step at which the queue holds keys alone. While it holds random rows, features do come together.
    """

    def __init__(self, ranks: Ranks, settled: int = 0) -> None:
        self.ranks, self.settled = ranks, settled
        self.step = -1
        self.names: list[str] = []
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=ranks.device)
        self.values = torch.zeros((), device=ranks.device)
        self.spread: Tensor | None = None  # feature_std
        self.told = False

    def update(self, step: int, metrics: dict[str, Tensor]) -> None:
        """metrics: 0-dim tensors, the total under "loss". No host sync."""
        self.step, self.names, self.spread = step, list(metrics), metrics.get("feature_std")
        newly_bad = (self.first_bad < 0) & ~metrics["loss"].isfinite()
        self.values = torch.where(newly_bad, torch.stack(list(metrics.values())).float(), self.values)
        self.first_bad = torch.where(newly_bad, step, self.first_bad)

    def check(self, encoder: nn.Module) -> list[str]:
        """Returns a sentence, once, when the features have collapsed, on every rank alike.

        Waits for the device: for log steps and before saving. Raises NonFiniteLoss with the step and the cause.
        """
        found = gather_objects(self.report(), self.ranks)
        bad = [(step, rank, values) for rank, (step, values, _) in enumerate(found) if step >= 0]
        if bad:
            raise NonFiniteLoss(f"{self.blame(*min(bad), encoder)}; {ADVICE}")
        spread = sum(spread for *_, spread in found) / len(found)
        if self.told or self.step < self.settled or not spread < COLLAPSED:
            return []
        self.told = True
        return [
            f"all images have nearly the same features (feature_std {spread:.2g}, random weights have 0.3 or more): "
            "if they stay so, use a lower --lr or --warmup-epochs; align alone needs uniform or contrast beside it"
        ]

    def blame(self, step: int, rank: int, values: str, encoder: nn.Module) -> str:
        """Where the loss was not finite first, and what is broken by now."""
        where = f" on rank {rank}" if self.ranks.world_size > 1 else ""
        broken = not_finite(encoder)
        cause = f"; {counted(len(broken), 'weight tensor')} with such values, first {broken[0]}" if broken else ""
        return f"the loss is not finite at step {step + 1}{where} ({values}){cause}"

    def report(self) -> tuple[int, str, float]:
        """The first bad step of this rank (-1 if none), its values in words, and the spread (NaN if unknown)."""
        step, spread = int(self.first_bad), math.nan if self.spread is None else float(self.spread)
        if step < 0:
            return step, "", spread
        return step, ", ".join(f"{name} {value:g}" for name, value in zip(self.names, self.values.tolist())), spread


def check_weights(encoder: nn.Module, ranks: Ranks, done: int) -> None:
    """Before saving: one step may spoil weights that no loss has met yet. Waits for the device.

    Raises NonFiniteLoss with the number of steps done, on every rank alike.
    """
    broken = next(filter(None, gather_objects(not_finite(encoder), ranks)), None)
    if broken:
        tensors = f"{counted(len(broken), 'weight tensor')} not finite, first {broken[0]}"
        raise NonFiniteLoss(f"the loss is finite, but step {done} left {tensors}; {ADVICE}")


def not_finite(encoder: nn.Module) -> list[str]:
    """Names of the weights and running statistics that hold NaN or infinity. Waits for the device, once."""
    tensors = {name: x for name, x in encoder.state_dict().items() if x.is_floating_point()}
    finite = torch.stack([x.isfinite().all() for x in tensors.values()]).tolist()
    return [name for name, good in zip(tensors, finite) if not good]
