"""Notices a run gone bad without making the step wait: the device remembers the first non-finite loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastssl.command import NOT_FINITE
from fastssl.distributed import Ranks, gather_objects


class NonFiniteLoss(ValueError):
    """The loss became NaN or infinite; nothing was saved since."""

    exit_code = NOT_FINITE


class Health:
    """The first step whose loss was not finite, and its values, kept on the device until someone asks."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.names: list[str] = []
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=ranks.device)
        self.values = torch.zeros((), device=ranks.device)

    def update(self, step: int, metrics: dict[str, Tensor]) -> None:
        """metrics: 0-dim tensors, the total under "loss". No host sync."""
        self.names = list(metrics)
        newly_bad = (self.first_bad < 0) & ~metrics["loss"].isfinite()
        self.values = torch.where(newly_bad, torch.stack(list(metrics.values())).float(), self.values)
        self.first_bad = torch.where(newly_bad, step, self.first_bad)

    def check(self, encoder: nn.Module, advice: str) -> None:
        """Raises NonFiniteLoss with the step and the cause, on every rank alike.

        Waits for the device: for log steps and before saving.
        """
        found = [(step, rank, values) for rank, (step, values) in enumerate(gather_objects(self.report(), self.ranks))]
        bad = [entry for entry in found if entry[0] >= 0]
        if not bad:
            return
        step, rank, values = min(bad)
        where = f" on rank {rank}" if self.ranks.world_size > 1 else ""
        broken = [name for name, p in encoder.named_parameters() if not bool(p.isfinite().all())]
        cause = f"; {len(broken)} weights are not finite by now, {broken[0]} the first" if broken else ""
        raise NonFiniteLoss(f"the loss is not finite at step {step + 1}{where} ({values}){cause}; {advice}")

    def report(self) -> tuple[int, str]:
        """The first bad step of this rank, -1 if none, and its values in words."""
        step = int(self.first_bad)
        if step < 0:
            return step, ""
        return step, ", ".join(f"{name} {value:g}" for name, value in zip(self.names, self.values.tolist()))
