"""A signal that asks a run to stop, and one decision of all ranks about it."""

from __future__ import annotations

import signal
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor

from fastssl.command import on_signals
from fastssl.distributed import Ranks


class StopSignal:
    """Whether any rank was asked to stop: all ranks get the same answer at the same step, without waiting.

    The vote begun at one step is counted at the next, while the GPU works, so hosts stay at most one step apart.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.asked = False
        self.vote: tuple[dist.Work, Tensor] | None = None

    def __call__(self) -> bool:
        """Call once a step, on every rank."""
        if self.ranks.world_size == 1:
            return self.asked
        agreed = False
        if self.vote is not None:
            work, ballot = self.vote
            work.wait()
            agreed = bool(ballot.item())  # a host tensor: no GPU sync
        ballot = torch.tensor([int(self.asked)])
        self.vote = (dist.all_reduce(ballot, dist.ReduceOp.MAX, async_op=True), ballot)
        return agreed

    def on_signals(self) -> AbstractContextManager[None]:
        """Inside the block SIGTERM and SIGUSR1 (Slurm's warning) ask this rank, so that the loop saves and stops."""

        def ask(signum: int, frame: object) -> None:
            self.asked = True

        return on_signals(ask, signal.SIGTERM, signal.SIGUSR1)
