"""Notices a non-finite loss without making the step wait: the device remembers the first one until it is asked."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastssl.command import NOT_FINITE
from fastssl.distributed import Ranks, gather_objects
from fastssl.plural import counted


class NonFiniteLoss(ValueError):
    """The loss became NaN or infinite; nothing has been saved since."""

    exit_code = NOT_FINITE


class Health:
    """The first step whose loss was not finite, and its metrics; kept on the device until `check`."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.names: list[str] = []
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=ranks.device)
        self.values = torch.zeros((), device=ranks.device)

    def update(self, step: int, metrics: dict[str, Tensor]) -> None:
        """metrics: 0-dim tensors by name, the total under "loss". No host sync."""
        self.names = list(metrics)
        newly_bad = (self.first_bad < 0) & ~metrics["loss"].isfinite()
        self.values = torch.where(newly_bad, torch.stack(list(metrics.values())).float(), self.values)
        self.first_bad = torch.where(newly_bad, step, self.first_bad)

    def check(self, encoder: nn.Module, advice: str) -> None:
        """Raises NonFiniteLoss, on every rank, when any rank has seen one; the message names the step and the weights.

        Waits for the device, so it is for log steps and before saving.
        """
        reports = gather_objects(self.report(), self.ranks)
        bad = [(step, rank, values) for rank, (step, values) in enumerate(reports) if step >= 0]
        if not bad:
            return
        step, rank, values = min(bad)
        where = f" on rank {rank}" if self.ranks.world_size > 1 else ""
        broken = [name for name, p in encoder.named_parameters() if not bool(p.isfinite().all())]
        cause = f"; {counted(len(broken), 'weight tensor')} with such values, first {broken[0]}" if broken else ""
        raise NonFiniteLoss(f"the loss is not finite at step {step + 1}{where} ({values}){cause}; {advice}")

    def report(self) -> tuple[int, str]:
        """The first bad step of this rank, or -1, and its metrics as text."""
        step = int(self.first_bad)
        if step < 0:
            return step, ""
        return step, ", ".join(f"{name} {value:g}" for name, value in zip(self.names, self.values.tolist()))
