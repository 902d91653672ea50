"""Refuses impossible values and combinations of options, before anything is read or written."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastssl.config import Config

# The options with a smallest value. An option that is None, for "by default", is not compared.
SMALLEST = {
    1: (
        "batch_size", "epochs", "steps", "accumulate", "dim", "queue_size", "image_size", "bn_splits", "log_every",
        "keep_last", "save_every_epochs", "save_every_steps", "knn_k", "knn_images", "block_size",
        "synthetic_images", "synthetic_size",
    ),
    0: (
        "lr", "weight_decay", "lr_drop", "warmup_epochs", "start_epoch", "keep_every_epochs", "knn_every", "read_ahead",
        "workers",
    ),
}  # fmt: skip
SHARES = ("ema_momentum", "momentum")  # must lie in [0, 1]


def check(config: Config, options: dict[str, object]) -> None:
    """Checks `config`, all of whose options are also in `options` by name.

    Raises ValueError that names the flag and the fix.
    """
    check_values({name: value for name, value in options.items() if value is not None})
    check_combinations(config)


def check_values(options: dict[str, object]) -> None:
    """Checks every number by itself."""
    for name, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{flag_of(name)} must be a finite number, got {value}")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{flag_of(name)} must fit into 64 bits, got {value}")
    for smallest, names in SMALLEST.items():
        for name in names:
            if options.get(name, smallest) < smallest:
                raise ValueError(f"{flag_of(name)} must be at least {smallest}, got {options[name]}")
    for name in SHARES:
        if not 0 <= options[name] <= 1:
            raise ValueError(f"{flag_of(name)} must lie in [0, 1], got {options[name]}")
    if options.get("clip_grad", 1) <= 0:
        raise ValueError(f"--clip-grad must be greater than 0, got {options['clip_grad']}")
    if min(options["milestones"], default=1) < 1:
        raise ValueError(f"--milestones must be epochs from 1 on, got {min(options['milestones'])}")
    smallest, largest = options["crop_scale"]
    if not 0 < smallest <= largest <= 1:
        raise ValueError(f"--crop-scale needs 0 < smallest <= largest <= 1, got {options['crop_scale']}")


def check_combinations(config: Config) -> None:
    """Checks the options that depend on each other."""
    t, m, o, a = config.train, config.model, config.optim, config.augment
    if m.sync_bn and m.bn_splits > 1:
        raise ValueError("--sync-bn and --bn-splits exclude each other: remove one of them")
    if a.policy != "small" and a.cj is not None:
        raise ValueError(f"--cj applies only to --policy small, not to {a.policy}: add --policy small or remove --cj")
    if config.input.resident_shard and config.input.loader != "resident":
        raise ValueError(
            f"--resident-shard applies only to --loader resident, not to {config.input.loader}: add --loader resident"
        )
    if t.restart and t.resume in ("no", "", "auto"):
        raise ValueError("--restart needs --resume PATH: name the checkpoint whose weights to start from")
    if t.resume == "auto:":
        raise ValueError("--resume auto: names no checkpoint: give its path behind the colon, or auto alone")
    if t.restart and t.start_epoch:
        raise ValueError("--restart begins at epoch 0: remove --start-epoch")
    if t.compile == "graphs" and o.accumulate > 1:  # a replay overwrites the gradients of the one before
        raise ValueError("--compile graphs and --accumulate exclude each other: remove one of them")
    if t.batch_size % o.accumulate:
        raise ValueError(f"--batch-size {t.batch_size} must be a multiple of --accumulate {o.accumulate}")
    if o.warmup_epochs >= t.epochs:
        raise ValueError(f"--warmup-epochs {o.warmup_epochs} must be fewer than --epochs {t.epochs}")
    if t.start_epoch >= t.epochs:
        raise ValueError(f"--start-epoch {t.start_epoch} must be less than --epochs {t.epochs}")
    if config.eval.eval_resize is not None and config.eval.eval_resize < a.image_size:
        raise ValueError(f"--eval-resize {config.eval.eval_resize} must be at least --image-size {a.image_size}")


def spell(name: str, value: object) -> str:
    """The option called `name` with its value, as on a command line."""
    if isinstance(value, bool):
        return flag_of(name) if value else flag_of(f"no_{name}")
    return f"{flag_of(name)} {value}"


def flag_of(name: str) -> str:
    """The flag of the option called `name`."""
    return "--" + name.replace("_", "-")
