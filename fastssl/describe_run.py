"""What a run says before its first step: what it trains on, what was chosen, and why."""

from __future__ import annotations

import math

from fastssl.augment.choose import choose_augment_kernel
from fastssl.build import Trainee
from fastssl.config import Config
from fastssl.distributed import Ranks
from fastssl.idle_options import idle_options
from fastssl.loaders.make import Loader
from fastssl.losses import LossConfig, choose_kernel
from fastssl.machine.precision import explain_precision
from fastssl.optim import supports_scaler_without_sync
from fastssl.plan import Plan, directions
from fastssl.plural import counted
from fastssl.trials.compile_encoders import HOW_NAMES
from fastssl.trials.layout import LAYOUT_NAMES


def describe(config: Config, plan: Plan, loader: Loader, trainee: Trainee, ranks: Ranks) -> list[str]:
    """The lines printed before a run: what was chosen, and why."""
    t, a, c = config.train, config.augment, config.loss
    encoder, queue = trainee.moco.encoder_q, trainee.moco.queue
    millions = sum(p.numel() for p in encoder.parameters()) / 1e6
    temperature = c.temperature if c.contrast_weight else None
    kernel, why = choose_kernel(ranks.device, queue.dtype, config.model.dim, t.loss_kernel, temperature)
    views, why_views = choose_augment_kernel(ranks.device, a.augment_kernel)
    both = ", both ways" if config.moco.symmetric else ""
    classes = f" in {counted(len(loader.class_names), 'class', 'classes')}" if loader.class_names else ""
    precision, why_precision = explain_precision(t.precision, ranks.device)
    return [
        *warn(config, loader, trainee, precision),
        f"{counted(loader.num_images, 'image')}{classes}; loader {loader.name} ({loader.reason})",
        f"{config.model.arch}, {config.model.head} head, {millions:.1f} M weights; batch size {t.batch_size}, "
        f"{counted(plan.steps_per_epoch, 'step')} per epoch, {plan.stop:,} in all",
        f"{ranks.world_size} x {ranks.device.type}, {precision} ({why_precision}), "
        f"{LAYOUT_NAMES[trainee.moco.memory_format]} ({trainee.why_layout}), "
        f"encoders {HOW_NAMES[trainee.compiled]} ({trainee.why_compiled})",
        f"loss {describe_loss(c, len(queue))}{both}; loss kernel {kernel} ({why})",
        f"augmentation policy {a.policy}; augmentation kernel {views} ({why_views}); "
        f"{config.optim.optimizer} {trainee.whose_optimizer}",
    ]


def warn(config: Config, loader: Loader, trainee: Trainee, precision: str) -> list[str]:
    """Choices that are allowed but may be mistakes."""
    optimizer, queue, ways = config.optim.optimizer, len(trainee.moco.queue), directions(config)
    of_an_epoch = ways * loader.num_images
    lines = list(loader.notices)
    if idle := idle_options(config):
        lines.append(f"without effect: {', '.join(idle)}")
    if precision == "fp16" and not supports_scaler_without_sync(trainee.optimizer):
        lines.append(f"fp16 with {optimizer} makes every step wait for the GPU; bf16 and fp32 do not")
    if queue > of_an_epoch:
        lines.append(
            f"the queue holds {queue:,} keys of {loader.num_images:,} images, so an image meets up to "
            f"{ways * math.ceil(queue / of_an_epoch)} older keys of its own as negatives; a smaller --queue-size helps"
        )
    return lines


def describe_loss(c: LossConfig, queue_size: int) -> str:
    """The weighted terms, and the value of the contrastive one by chance, where its curve begins."""
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
