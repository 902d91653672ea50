"""What no run can be: impossible values and combinations of options, refused before anything is read or written."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastssl.config import Config

# The smallest value of an option, by its name. What is None, "by default", is never compared.
SMALLEST = {
    1: (
        "batch_size", "epochs", "steps", "accumulate", "dim", "queue_size", "image_size", "bn_splits", "log_every",
        "keep_last", "save_every_epochs", "save_every_steps", "knn_k", "knn_images", "workers", "block_size",
        "synthetic_images", "synthetic_size",
    ),
    0: (
        "lr", "weight_decay", "lr_drop", "warmup_epochs", "start_epoch", "keep_every_epochs", "knn_every", "read_ahead",
    ),
}  # fmt: skip
SHARES = ("ema_momentum", "momentum")  # these lie in [0, 1]


def check(config: Config, options: dict[str, object]) -> None:
    """Refuses impossible values and combinations; `options` are all of `config` by name.

    Raises ValueError that names the flag and the mend.
    """
    check_values({name: value for name, value in options.items() if value is not None})
    check_combinations(config)


def check_values(options: dict[str, object]) -> None:
    """Every number by itself."""
    for name, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{flag_of(name)} must be a finite number, got {value}")
    for smallest, names in SMALLEST.items():
        for name in names:
            if options.get(name, smallest) < smallest:
                raise ValueError(f"{flag_of(name)} must be at least {smallest}, got {options[name]}")
    for name in SHARES:
        if not 0 <= options[name] <= 1:
            raise ValueError(f"{flag_of(name)} must lie in [0, 1], got {options[name]}")
    if options.get("clip_grad", 1) <= 0:
        raise ValueError(f"--clip-grad must be greater than 0, got {options['clip_grad']}")
    if not -(2**63) <= options["seed"] < 2**63:
        raise ValueError(f"--seed must fit into 64 bits, got {options['seed']}")
    smallest, largest = options["crop_scale"]
    if not 0 < smallest <= largest <= 1:
        raise ValueError(f"--crop-scale needs 0 < smallest <= largest <= 1, got {options['crop_scale']}")


def check_combinations(config: Config) -> None:
    """What options are together."""
    t, m, o, a = config.train, config.model, config.optim, config.augment
    if m.sync_bn and m.bn_splits > 1:
        raise ValueError("--sync-bn and --bn-splits contradict each other: statistics over all ranks or over parts")
    if a.policy != "small" and a.cj is not None:
        raise ValueError(f"--cj belongs to --policy small, not to {a.policy}: add --policy small or leave it out")
    if config.input.resident_shard and config.input.loader != "resident":
        raise ValueError(f"--resident-shard belongs to --loader resident, not to {config.input.loader}")
    if t.restart and (t.resume in ("no", "", "auto") or t.start_epoch):
        raise ValueError("--restart takes the weights of --resume PATH and begins at epoch 0: name the checkpoint")
    if t.compile == "graphs" and o.accumulate > 1:  # a replay overwrites the gradients of the one before
        raise ValueError("--compile graphs and --accumulate contradict each other: leave one out")
    if t.batch_size % o.accumulate:
        raise ValueError(f"--batch-size {t.batch_size} must be a multiple of --accumulate {o.accumulate}")
    if o.warmup_epochs >= t.epochs:
        raise ValueError(f"--warmup-epochs {o.warmup_epochs} must be fewer than --epochs {t.epochs}")
    if t.start_epoch >= t.epochs:
        raise ValueError(f"--start-epoch {t.start_epoch} leaves nothing of --epochs {t.epochs} to train")
    if config.eval.eval_resize is not None and config.eval.eval_resize < a.image_size:
        raise ValueError(f"--eval-resize {config.eval.eval_resize} must be at least --image-size {a.image_size}")


def flag_of(name: str) -> str:
    """The flag of an option."""
    return "--" + name.replace("_", "-")
