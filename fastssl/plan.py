"""The numbers of a run that follow from its configuration, its ranks and the size of its data set."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastssl.config import Config
from fastssl.distributed import Ranks
from fastssl.schedules import learning_rate, momentum_schedule

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Plan(NamedTuple):
    """How long the run is, in optimiser steps, and with what values at each."""

    config: Config
    steps_per_epoch: int
    total_steps: int  # of the schedules
    stop: int  # where the run ends: total_steps, or --steps

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def learning_rate(self, step: int) -> float:
        o = self.config.optim
        return learning_rate(
            step,
            base_lr=o.lr,
            epochs=self.config.train.epochs,
            steps_per_epoch=self.steps_per_epoch,
            schedule=o.lr_schedule,
            milestones=o.milestones,
            drop=o.lr_drop,
            warmup_epochs=o.warmup_epochs,
        )

    def ema_momentum(self, step: int) -> float:
        m = self.config.moco
        return momentum_schedule(step, momentum=m.ema_momentum, total_steps=self.total_steps, schedule=m.ema_schedule)

    def ends_epoch(self, done: int, every: int) -> bool:
        """Whether `done` steps are a multiple of `every` epochs (0: never)."""
        return every > 0 and done % (every * self.steps_per_epoch) == 0

    def saves_after(self, done: int) -> bool:
        """Whether a checkpoint is due after `done` steps."""
        every = self.config.train.save_every_steps
        return self.ends_epoch(done, self.config.train.save_every_epochs) or (every is not None and done % every == 0)


def make_plan(config: Config, steps_per_epoch: int) -> Plan:
    """The plan of a run whose loader gives so many batches an epoch."""
    t = config.train
    total = t.epochs * steps_per_epoch
    return Plan(config, steps_per_epoch, total, total if t.steps is None else min(total, t.steps))


def rank_batch_size(config: Config, ranks: Ranks) -> int:
    """Images of a step on one rank. Raises ValueError when the batch does not divide evenly."""
    parts = ranks.world_size * config.optim.accumulate
    size, rest = divmod(config.train.batch_size, parts)
    if rest or size == 0:
        raise ValueError(
            f"--batch-size {config.train.batch_size} must be a multiple of {parts} "
            f"({ranks.world_size} processes x --accumulate {config.optim.accumulate})"
        )
    views = size * directions(config)
    if views % config.model.bn_splits:
        raise ValueError(
            f"the batch of one device, {views}, must be a multiple of --bn-splits {config.model.bn_splits}"
        )
    return size * config.optim.accumulate


def directions(config: Config) -> int:
    """How often a pair of views enters the loss: the first as the query, and with --symmetric the second as well."""
    return 2 if config.moco.symmetric else 1


def encoder_batch_size(config: Config, ranks: Ranks) -> int:
    """Views in one forward pass of an encoder on one rank. Raises ValueError as `rank_batch_size`."""
    return rank_batch_size(config, ranks) // config.optim.accumulate * directions(config)


def choose_precision(precision: str, device: torch.device) -> str:
    """fp32, bf16 or fp16 for `auto`: what the device computes fastest without harm."""
    return explain_precision(precision, device)[0]


def explain_precision(precision: str, device: torch.device) -> tuple[str, str]:
    """`choose_precision`, and why in a few words."""
    if precision != "auto":
        return precision, "asked for"
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "this GPU computes with it") if native else ("fp16", "this GPU has no bf16")
    if device.type == "cpu" and (unit := bf16_unit()):
        return "bf16", f"this CPU has {unit}"
    return "fp32", f"no 16-bit arithmetic on this {device.type}"


def bf16_unit() -> str:
    """The instructions by which this CPU multiplies bf16, "" where it has none or torch (before 2.10) cannot tell."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    units = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16"}
    return next((unit for name, unit in units.items() if capabilities.get(name)), "")
