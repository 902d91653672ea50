"""Pretraining.  fastssl pretrain DATA [flags]   or   torchrun --nproc_per_node 8 -m fastssl.train DATA [flags]

file -> loader -> augment -> encoders q, k -> losses -> optimizer -> checkpoint -> eval, in that order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from fastssl import checkpoint, distributed, flags
from fastssl.augment.policy import Policy, make_policy
from fastssl.augment.views import make_views
from fastssl.batch import ImageBatch
from fastssl.command import PREEMPTED, run_command, stop_on_signals
from fastssl.config import Config
from fastssl.distributed import Ranks, StopSignal, shuffle_rows, unshuffle_keys
from fastssl.health import Health
from fastssl.loaders.make import make_loader
from fastssl.losses import moco_loss
from fastssl.moco import MoCo
from fastssl.models.batchnorm import convert_sync_batchnorm, split_batchnorm
from fastssl.models.encoders import make_encoder
from fastssl.optim import make_optimizer, set_lr
from fastssl.plan import DTYPES, Plan, choose_precision, make_plan, micro_batch_size
from fastssl.random_key import STREAM_SHUFFLE, STREAM_STEP, derive_seed, permutation
from fastssl.run import Run

TrainStep = Callable[[Sequence[ImageBatch], int], dict[str, Tensor]]
RENAME = {"total": "loss"}


class Trainee(NamedTuple):
    """What a step changes: the model and its optimiser."""

    moco: MoCo
    encoder_q: nn.Module  # moco.encoder_q, or its DDP wrapper
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler


def make_train_step(
    config: Config, plan: Plan, trainee: Trainee, policy: Policy, ranks: Ranks, health: Health
) -> TrainStep:
    """The only definition of a training step, `train_step(micro_batches, step) -> metrics`.

    The order is the paper's: EMA, keys, losses against the queue as it was, optimiser, enqueue. `micro_batches` are
    this rank's `--accumulate` batches of step `step` (from 0); metrics are 0-dim tensors on the device. Nothing in it
    waits for the device.
    """
    moco, encoder_q, optimizer, scaler = trainee
    seed, accumulate = config.train.seed, config.optim.accumulate
    dtype = DTYPES[choose_precision(config.train.precision, ranks.device)]
    parameters = [p for p in moco.encoder_q.parameters() if p.requires_grad]
    # a shuffle within one sub-batch changes nothing, nor does one under statistics over all ranks
    shuffles = not config.model.sync_bn and ranks.world_size * config.model.bn_splits > 1

    def autocast() -> torch.autocast:
        return torch.autocast(ranks.device.type, dtype=dtype, enabled=dtype != torch.float32)

    @torch.no_grad()
    def encode_keys(view_k: Tensor, micro_step: int) -> Tensor:
        """All ranks' keys (W * B, D) in rank order, unit rows."""
        if not shuffles:
            with autocast():
                z = moco.encoder_k(view_k)
            return distributed.gather_rows(normalize(z.float(), dim=1), ranks)
        order = permutation(seed, micro_step, ranks.world_size * view_k.shape[0], STREAM_SHUFFLE)
        with autocast():
            z = moco.encoder_k(shuffle_rows(view_k, order, ranks))
        return unshuffle_keys(normalize(z.float(), dim=1), order, ranks)

    def train_step(micro_batches: Sequence[ImageBatch], step: int) -> dict[str, Tensor]:
        torch.manual_seed(derive_seed(seed, step, STREAM_STEP, ranks.rank))  # dropout: a function of the step
        set_lr(optimizer, plan.learning_rate(step))
        moco.update_key_encoder(plan.ema_momentum(step))
        keys, losses = [], []
        for micro, batch in enumerate(micro_batches):
            view_q, view_k = make_views(batch, policy, config.augment.image_size, seed, plan.epoch(step), dtype)
            all_keys = encode_keys(view_k, step * accumulate + micro)
            k = all_keys.chunk(ranks.world_size)[ranks.rank]  # (B, D)
            if ranks.world_size > 1:
                encoder_q.require_backward_grad_sync = micro + 1 == accumulate
            with autocast():
                z = encoder_q(view_q)
            q = normalize(z.float(), dim=1)
            loss = moco_loss(q, k, moco.queue, config.loss, config.train.loss_kernel)
            scaler.scale(loss.total / accumulate).backward()
            keys.append(all_keys)
            losses.append({RENAME.get(n, n): v.detach() for n, v in loss._asdict().items() if v is not None})
        metrics = {name: torch.stack([loss[name] for loss in losses]).mean() for name in losses[0]}
        metrics["feature_std"] = q.detach().std(dim=0, correction=0).norm()  # 1: spread out; 0: collapsed
        health.update(step, metrics)
        if config.optim.clip_grad is not None:
            scaler.unscale_(optimizer)
            metrics["grad_norm"] = nn.utils.clip_grad_norm_(parameters, config.optim.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        moco.update_queue(torch.cat(keys))
        return metrics

    return train_step
