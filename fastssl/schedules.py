"""Learning rate and key-encoder momentum as pure functions of the step, so that a checkpoint need not save them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def learning_rate(
    step: int,
    *,
    base_lr: float,
    epochs: int,
    steps_per_epoch: int,
    schedule: str = "cosine",
    milestones: Sequence[int] = (120, 160),
    drop: float = 0.1,
    warmup_epochs: float = 0.0,
) -> float:
    """Learning rate of optimizer step `step` (from 0). It changes with the epoch e, as in MoCo (arXiv 1911.05722).

    `cosine`: base_lr * (1 + cos(pi e / epochs)) / 2. `step`: base_lr times `drop` for every milestone <= e.
    `constant`: base_lr. During the first `warmup_epochs` the rate also rises linearly, step by step, from
    base_lr / warm-up steps; the cosine then covers the remaining epochs.

    Raises ValueError for an unknown schedule or sizes that make no sense together.
    """
    _check(schedule, epochs, steps_per_epoch, warmup_epochs)
    epoch = step // steps_per_epoch
    warmup_steps = warmup_epochs * steps_per_epoch
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    if schedule == "cosine":
        return warmup * _cosine(epoch - warmup_epochs, epochs - warmup_epochs, base_lr, 0.0)
    if schedule == "step":
        return warmup * _drop_at(epoch, base_lr, milestones, drop)
    return warmup * base_lr


def momentum_schedule(step: int, *, momentum: float, total_steps: int, schedule: str = "constant") -> float:
    """Momentum of the key encoder's update at `step` (from 0).

    `constant`: `momentum`. `cosine`: 1 - (1 - momentum) (1 + cos(pi step / total_steps)) / 2, which rises to 1 (BYOL,
    arXiv 2006.07733, appendix F.2).

    Raises ValueError for an unknown schedule, for `momentum` outside 0 to 1, or for fewer than 1 step.
    """
    if total_steps < 1:
        raise ValueError(f"training needs at least 1 step, got {total_steps}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"the momentum of the key encoder must lie between 0 and 1, got {momentum}")
    if schedule == "constant":
        return momentum
    if schedule == "cosine":
        return _cosine(step, total_steps, momentum, 1.0)
    raise ValueError(f"unknown momentum schedule {schedule!r}: choose constant or cosine")


def _check(schedule: str, epochs: int, steps_per_epoch: int, warmup_epochs: float) -> None:
    if schedule not in ("cosine", "step", "constant"):
        raise ValueError(f"unknown schedule {schedule!r}: choose cosine, step or constant")
    if epochs < 1 or steps_per_epoch < 1:
        raise ValueError(f"training needs at least 1 epoch and 1 step per epoch, got {epochs} and {steps_per_epoch}")
    if not 0 <= warmup_epochs < epochs:
        raise ValueError(f"the warm-up must be shorter than training: {warmup_epochs} of {epochs} epochs")


def _cosine(done: float, total: float, first: float, last: float) -> float:
    """Half a cosine wave from `first` (done <= 0) to `last` (done >= total)."""
    done = min(max(done, 0), total)
    return last + (first - last) * (0.5 * (1 + math.cos(math.pi * done / total)))


def _drop_at(epoch: int, lr: float, milestones: Sequence[int], drop: float) -> float:
    for milestone in milestones:
        if epoch >= milestone:
            lr *= drop
    return lr
