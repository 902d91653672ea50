"""What a run says before its first step: what it trains on, what was chosen, and why."""

from __future__ import annotations

import math

from fastssl.augment.choose import choose_augment_kernel
from fastssl.build import Trainee
from fastssl.compile_encoders import HOW_NAMES
from fastssl.config import Config
from fastssl.distributed import Ranks
from fastssl.layout import LAYOUT_NAMES
from fastssl.loaders.make import Loader
from fastssl.losses import LossConfig, choose_kernel
from fastssl.optim import supports_scaler_without_sync
from fastssl.plan import Plan, directions, explain_precision


def describe(config: Config, plan: Plan, loader: Loader, trainee: Trainee, ranks: Ranks) -> list[str]:
    """What a person wants to know before a long run, in a few lines."""
    t, a, c = config.train, config.augment, config.loss
    encoder, queue = trainee.moco.encoder_q, trainee.moco.queue
    millions = sum(p.numel() for p in encoder.parameters()) / 1e6
    temperature = c.temperature if c.contrast_weight else None
    kernel, why = choose_kernel(ranks.device, queue.dtype, config.model.dim, t.loss_kernel, temperature)
    views, why_views = choose_augment_kernel(ranks.device, a.augment_kernel)
    both = " (each view the query once)" if config.moco.symmetric else ""
    classes = f" of {len(loader.class_names)} classes" if loader.class_names else ""
    precision, why_precision = explain_precision(t.precision, ranks.device)
    return [
        *warn(config, loader, trainee, precision),
        f"{loader.num_images} images{classes}, loader {loader.name} ({loader.reason})",
        f"{config.model.arch}, {config.model.head} head, {millions:.1f} M weights, {t.batch_size} images a step{both}, "
        f"{plan.steps_per_epoch} steps an epoch, {plan.stop} in all",
        f"{ranks.world_size} x {ranks.device.type}, {precision} ({why_precision}), "
        f"{LAYOUT_NAMES[trainee.moco.memory_format]} ({trainee.why_layout}), "
        f"encoders {HOW_NAMES[trainee.compiled]} ({trainee.why_compiled})",
        f"loss {describe_loss(c, len(queue))} by {kernel} ({why}), views of policy {a.policy} by {views} "
        f"({why_views}), {config.optim.optimizer} {trainee.why_optimizer}",
    ]


def warn(config: Config, loader: Loader, trainee: Trainee, precision: str) -> list[str]:
    """What is allowed and may be a mistake."""
    optimizer, queue, ways = config.optim.optimizer, len(trainee.moco.queue), directions(config)
    of_an_epoch = ways * loader.num_images
    lines = []
    if precision == "fp16" and not supports_scaler_without_sync(trainee.optimizer):
        lines.append(f"every step waits for the device: fp16 with {optimizer} (bf16 or fp32 does not)")
    if queue > of_an_epoch:
        lines.append(
            f"the queue holds {queue} keys of {loader.num_images} images: each image meets up to "
            f"{ways * math.ceil(queue / of_an_epoch)} older keys of itself as negatives; --queue-size takes any number"
        )
    return lines


def describe_loss(c: LossConfig, queue_size: int) -> str:
    """The weighted terms, and what the contrastive one is where all keys are equally near: where its curve begins."""
    terms = []
    if c.contrast_weight:
        by_chance = math.log(queue_size + 1)
        terms.append(f"{c.contrast_weight:g} contrast (temperature {c.temperature:g}; by chance {by_chance:.2f})")
    if c.align_weight:
        terms.append(f"{c.align_weight:g} align (alpha {c.align_alpha:g})")
    if c.uniform_weight:
        pairs = "" if c.intra_batch else ", without the pairs of a batch"
        terms.append(f"{c.uniform_weight:g} uniform (t {c.uniform_t:g}{pairs})")
    return " + ".join(terms)
