"""Numbers that follow from the configuration, the ranks and the data: steps, schedules, batch size."""

from __future__ import annotations

import math
from typing import NamedTuple

from fastssl.config import Config
from fastssl.distributed import Ranks
from fastssl.plural import counted
from fastssl.schedules import learning_rate, momentum_schedule


class Plan(NamedTuple):
    """The length of the run in optimiser steps, and the scheduled values of each step (counted from 0)."""

    config: Config
    steps_per_epoch: int
    total_steps: int  # the length of the schedules
    stop: int  # the step before which the run ends: total_steps, or --steps

    def epoch(self, step: int) -> int:
        """The epoch to which `step` belongs."""
        return step // self.steps_per_epoch

    def learning_rate(self, step: int) -> float:
        """The learning rate of `step`."""
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
        """The momentum of the key encoder at `step`."""
        m = self.config.moco
        return momentum_schedule(step, momentum=m.ema_momentum, total_steps=self.total_steps, schedule=m.ema_schedule)

    def queue_filled(self) -> int:
        """The step before which the queue still holds some of its first, random rows."""
        steps = math.ceil(self.config.moco.queue_size / (self.config.train.batch_size * directions(self.config)))
        return self.config.train.start_epoch * self.steps_per_epoch + steps

    def ends_epoch(self, done: int, every: int) -> bool:
        """Whether `done` steps are a multiple of `every` epochs (0: never)."""
        return every > 0 and done % (every * self.steps_per_epoch) == 0

    def probes_after(self, done: int) -> bool:
        """Whether the k-NN probe is due after `done` steps."""
        return done == self.stop or self.ends_epoch(done, self.config.eval.knn_every)

    def saves_after(self, done: int) -> bool:
        """Whether a checkpoint is due after `done` steps."""
        t = self.config.train
        if t.save_every_steps is not None and done % t.save_every_steps == 0:
            return True
        return self.ends_epoch(done, t.save_every_epochs)


def make_plan(config: Config, steps_per_epoch: int) -> Plan:
    """The plan of a run whose loader gives `steps_per_epoch` batches per epoch."""
    t = config.train
    total = t.epochs * steps_per_epoch
    return Plan(config, steps_per_epoch, total, total if t.steps is None else min(total, t.steps))


def rank_batch_size(config: Config, ranks: Ranks) -> int:
    """Images per step on one rank. Raises ValueError when the batch size does not divide evenly."""
    parts = ranks.world_size * config.optim.accumulate
    size, rest = divmod(config.train.batch_size, parts)
    if rest:
        raise ValueError(
            f"--batch-size {config.train.batch_size} must be a multiple of {parts} "
            f"({counted(ranks.world_size, 'process', 'processes')} x --accumulate {config.optim.accumulate})"
        )
    views = size * directions(config)
    if views % config.model.bn_splits:
        raise ValueError(
            f"the micro-batch of one device, {views}, must be a multiple of --bn-splits {config.model.bn_splits}: "
            "change --batch-size or --bn-splits"
        )
    return size * config.optim.accumulate


def directions(config: Config) -> int:
    """How many views of a pair are queries in the loss: one, or with --symmetric both."""
    return 2 if config.moco.symmetric else 1


def encoder_batch_size(config: Config, ranks: Ranks) -> int:
    """Views in a forward pass of an encoder on one rank. Raises ValueError as `rank_batch_size` does."""
    return rank_batch_size(config, ranks) // config.optim.accumulate * directions(config)
