"""Which settings a run must share with the checkpoint that it goes on from, and what it means when others differ."""

from __future__ import annotations

from pathlib import Path

from fastssl.checkpoint import CheckpointError
from fastssl.config import Config, flat
from fastssl.config_checks import spell
from fastssl.plan import Plan
from fastssl.plural import counted

# If one of these changes, the saved state no longer fits. If any other setting changes that is not in HARMLESS, the run
# continues, but differs from one that was never stopped.
SHAPES = ("arch", "head", "dim", "stem", "queue_size", "optimizer")
COUNTS = ("batch_size",)  # a folder's records, and the names of its checkpoints, count steps of this size
HARMLESS = {  # these do not influence the weights
    "data", "loader", "workers", "output", "resume", "log_every", "save_every_epochs", "save_every_steps", "keep_last",
    "keep_every_epochs", "knn_every", "knn_k", "knn_images", "eval_resize", "val", "steps", "start_epoch", "restart",
    "on_bad_image", "read_ahead", "beton_cache", "debug",
}  # fmt: skip


def check_fits(path: Path, then: dict[str, object], config: Config) -> None:
    """Raises CheckpointError where the saved options `then` make another model, optimiser or count of steps."""
    counts = COUNTS if config.train.resume == "auto" else ()
    groups = ("exclude_norm_bias",) if config.optim.optimizer != "lars" else ()  # which always exempts them
    now = flat(config)
    for option in (*SHAPES, *counts, *groups):
        check_same(path, option, then[option], now[option])


def check_same(path: Path, option: str, then: object, now: object) -> None:
    """Raises CheckpointError when an option has changed that must not."""
    if then != now:
        used, has = spell(option, then), spell(option, now) if isinstance(now, bool) else now
        raise CheckpointError(
            f"{path} was trained with {used} but this run has {has}: use {used}, or start in another --output"
        )


def describe_changes(state: dict, config: Config, num_images: int, world_size: int) -> list[str]:
    """A note for each change since a checkpoint was saved that touches the weights to come."""
    notes, then = [], state["config"]
    for key, value in flat(config).items():
        if key not in HARMLESS and key in then and then[key] != plain(value):
            change = f"{key} is now {value} and was {then[key]}"
            notes.append(f"{change}: the run continues, but differs from one that was never stopped")
    if world_size != state.get("world_size", world_size):  # early checkpoints do not have it
        change = f"the world size is now {world_size} and was {state['world_size']}"
        images = " and, by --resident-shard, each rank other images" if config.input.resident_shard else ""
        notes.append(f"{change}: batch norm and the uniform loss see other parts of a batch{images}")
    if num_images != state["num_images"]:
        change = f"the data set now has {counted(num_images, 'image')} and had {state['num_images']:,}"
        notes.append(f"{change}: the order of the images differs")
    return notes


def keep_epoch(state: dict, config: Config, plan: Plan) -> tuple[int, list[str]]:
    """The steps already done, and a note when an epoch now has another number of them.

    In a folder of its own the run goes on at the same epoch; the folder it was in counts on in its own steps.
    """
    step, per_epoch = state["step"], state["num_images"] // state["config"]["batch_size"]
    if per_epoch == plan.steps_per_epoch:
        return step, []
    first = step if config.train.resume == "auto" else step * plan.steps_per_epoch // per_epoch
    now = first / plan.steps_per_epoch
    return first, [
        f"an epoch now has {counted(plan.steps_per_epoch, 'step')} and had {per_epoch:,}: it was saved after step "
        f"{step:,}, {step / per_epoch:.2f} epochs, and goes on after step {first:,}, {now:.2f} epochs"
    ]


def plain(value: object) -> object:
    """As a checkpoint holds it: lists instead of tuples."""
    return list(value) if isinstance(value, tuple) else value
