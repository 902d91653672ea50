"""From a run to a checkpoint and back: where a run begins, and what it must agree on with the one it goes on from."""

from __future__ import annotations

from pathlib import Path

from fastssl import checkpoint
from fastssl.build import Trainee
from fastssl.checkpoint import CheckpointError
from fastssl.config import Config, flat
from fastssl.config_checks import flag_of
from fastssl.distributed import Ranks, broadcast_object
from fastssl.foreign import find_moco_run, load_into, read_moco_run
from fastssl.foreign.read import Contents
from fastssl.layout import LAYOUT_NAMES
from fastssl.moco import MoCo
from fastssl.optim import load_optimizer_state
from fastssl.plan import Plan

# Without these the weights do not fit; with the others changed the run goes on, but is no longer the uninterrupted one.
SHAPES = ("arch", "head", "dim", "stem", "queue_size", "optimizer")
# These may change freely: they do not touch a single weight.
HARMLESS = {
    "data", "loader", "workers", "output", "resume", "log_every", "save_every_epochs", "save_every_steps", "keep_last",
    "keep_every_epochs", "knn_every", "knn_k", "knn_images", "eval_resize", "val", "steps", "start_epoch", "restart",
    "on_bad_image", "read_ahead", "beton_cache",
}  # fmt: skip


def state_of(trainee: Trainee, step: int, config: Config, num_images: int, world_size: int) -> dict:
    """The checkpoint after `step` steps: tensors, numbers, strings, lists and dicts only."""
    return {
        "format": checkpoint.FORMAT,
        "step": step,
        "config": {k: list(v) if isinstance(v, tuple) else v for k, v in flat(config).items()},
        "num_images": num_images,
        "world_size": world_size,
        "layout": LAYOUT_NAMES[trainee.moco.memory_format],
        "model": trainee.moco.state_dict(),
        "optimizer": trainee.optimizer.state_dict(),
        "scaler": trainee.scaler.state_dict(),
    }


def start_or_resume(
    config: Config, plan: Plan, trainee: Trainee, folder: Path, num_images: int, ranks: Ranks
) -> tuple[int, list[str]]:
    """Steps already done, with their state loaded into `trainee`, and what to tell the person about it.

    --resume PATH takes that checkpoint (ours, or one of MoCo's scripts), and with --restart only its weights; --resume
    auto the newest good one of the run folder; otherwise, or when there is none, the run starts afresh. Raises
    CheckpointError when a checkpoint cannot be used, or none of several; ValueError when --start-epoch leaves no step.
    """
    path, notes = find_checkpoint(config.train.resume, folder, ranks)
    if path is None:
        first = config.train.start_epoch * plan.steps_per_epoch
        if first >= plan.stop:
            started = f"--start-epoch {config.train.start_epoch} begins after step {first}"
            raise ValueError(f"{started}, --steps {plan.stop} ends before it: raise --steps")
        return first, notes
    if config.train.restart:
        return 0, start_from_weights(path, trainee, config)
    try:
        first, changed = restore(path, trainee, config, num_images, ranks.world_size)
    except CheckpointError:
        if (contents := find_moco_run(path)) is None:
            raise
        first, changed = restore_moco_run(contents, trainee, config, plan)
    complete = " (the run is complete)" if first >= plan.stop else ""
    return first, [*notes, f"going on from {path}, after {first} steps{complete}", *changed]


def start_from_weights(path: Path, trainee: Trainee, config: Config) -> list[str]:
    """The query encoder's weights from any checkpoint, the key encoder equal to it; queue and optimiser stay fresh.

    The small-model project also keeps a checkpoint's queue here; a distilled student's queue holds its teacher's keys.
    Returns what was taken. Raises CheckpointError when the backbone does not fit.
    """
    moco = trainee.moco
    notes = load_into(path, moco.encoder_q, config.model.arch, config.model.stem)
    moco.encoder_k.load_state_dict(moco.encoder_q.state_dict())
    return [f"starting from the {note}" if i == 0 else note for i, note in enumerate(notes)]


def find_checkpoint(resume: str, folder: Path, ranks: Ranks) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, the same on every rank, and notes about those that were passed over."""
    if resume in ("no", ""):
        return None, []
    if resume != "auto":
        if Path(resume).is_dir():
            raise CheckpointError(f"{resume} is a folder: --resume auto --output {resume} goes on with the run in it")
        return Path(resume), []
    notes: list[str] = []
    path = None
    if ranks.rank == 0:
        path = checkpoint.newest_good(folder / "checkpoints", notes)
    path, notes = broadcast_object((path, notes), ranks)
    if path is None and notes:
        raise CheckpointError(f"no checkpoint in {folder} can be used: {notes[-1]}")
    if path is None:
        return None, [f"nothing to resume in {folder}: starting afresh"]
    return path, [f"{note}; using the one before it" for note in notes]


def restore(path: Path, trainee: Trainee, config: Config, num_images: int, world_size: int) -> tuple[int, list[str]]:
    """Loads a checkpoint into the run. Returns the steps already done and notes on settings that changed since.

    Raises CheckpointError when it belongs to another model.
    """
    state = checkpoint.load(path)
    then, now = state["config"], flat(config)
    for key in SHAPES:
        check_same(path, key, then[key], now[key])
    try:
        trainee.moco.load_state_dict(state["model"])
        notes = keep_layout(trainee.moco, state, config)  # first: the optimiser's buffers follow the weights
        load_optimizer_state(trainee.optimizer, state["optimizer"])
        trainee.scaler.load_state_dict(state["scaler"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} does not fit this model: {str(error).splitlines()[0]}") from error
    changed = [k for k in now if k not in HARMLESS and k in then and then[k] != _plain(now[k])]
    notes += [f"{k} is {now[k]}, was {then[k]}: the run goes on, but not as if it had never stopped" for k in changed]
    if world_size != state.get("world_size", world_size):  # not in checkpoints of before it was written down
        notes.append(
            f"the world size is {world_size}, was {state['world_size']}: batch norm sees other parts of a batch"
        )
    if num_images != state["num_images"]:
        notes.append(f"the data set has {num_images} images, had {state['num_images']}: the order of images differs")
    return state["step"], notes


def restore_moco_run(contents: Contents, trainee: Trainee, config: Config, plan: Plan) -> tuple[int, list[str]]:
    """Loads a run of MoCo's scripts with its key encoder, queue and momentum. Returns steps and notes as `restore`.

    Raises CheckpointError when it belongs to another model.
    """
    moco, m = trainee.moco, config.model
    run = read_moco_run(contents, m.arch, m.stem)
    dim, queue_size = run.model["queue"].shape[1], run.model["queue"].shape[0]
    then = {"head": run.head, "dim": dim, "queue_size": queue_size, "optimizer": "sgd"}
    for key, value in then.items():
        check_same(contents.path, key, value, flat(config)[key])
    try:
        moco.load_state_dict(run.model)
        load_optimizer_state(trainee.optimizer, run.optimizer)
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{contents.path} does not fit this model: {str(error).splitlines()[0]}") from error
    return run.epochs * plan.steps_per_epoch, [
        f"it is a checkpoint of MoCo's scripts after {run.epochs} epochs: encoders, queue and momentum are its own, "
        "the order of images and the augmentation this run's"
    ]


def check_same(path: Path, option: str, then: object, now: object) -> None:
    """Raises CheckpointError where an option that the shapes depend on has changed."""
    flag = flag_of(option)
    if then != now:
        raise CheckpointError(
            f"{path} was trained with {flag} {then}, this run has {now}: pass {flag} {then}, or start in another "
            "--output"
        )


def keep_layout(moco: MoCo, state: dict, config: Config) -> list[str]:
    """The memory format the run had until now, unless another was asked for, so that it goes on bit for bit."""
    saved = next((layout for layout, name in LAYOUT_NAMES.items() if name == state.get("layout")), moco.memory_format)
    if config.train.channels_last != "auto" or saved == moco.memory_format:
        return []
    moco.set_memory_format(saved)
    return [f"the encoders stay {LAYOUT_NAMES[saved]}, as before"]


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
