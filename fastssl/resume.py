"""Between a run and its checkpoints: what is saved, and where a run begins."""

from __future__ import annotations

from pathlib import Path

from fastssl import checkpoint
from fastssl.build import Trainee
from fastssl.checkpoint import CheckpointError
from fastssl.config import Config, flat
from fastssl.distributed import Ranks, broadcast_object
from fastssl.foreign import find_moco_run, load_into, read_moco_run
from fastssl.foreign.read import Contents
from fastssl.moco import MoCo
from fastssl.optim import load_optimizer_state
from fastssl.plan import Plan
from fastssl.plural import counted
from fastssl.resume_checks import check_fits, check_same, describe_changes, keep_epoch, plain
from fastssl.trials.layout import LAYOUT_NAMES


def state_of(trainee: Trainee, step: int, config: Config, num_images: int, world_size: int) -> dict:
    """The checkpoint after `step` steps: only tensors, numbers, strings, lists and dicts."""
    return {
        "format": checkpoint.FORMAT,
        "step": step,
        "config": {name: plain(value) for name, value in flat(config).items()},
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
    """Loads the state to continue from, if any, into `trainee`; returns the steps already done and notes for the user.

    --resume PATH loads that checkpoint (ours, or one of MoCo's scripts), or with --restart only its weights; --resume
    auto loads the newest intact one of the run folder. Otherwise, or when there is none, the run starts from scratch.
    Raises CheckpointError when a checkpoint cannot be used, or none of several; ValueError when --start-epoch leaves no
    step.
    """
    path, notes = find_checkpoint(config.train.resume, folder, ranks)
    if path is None:
        first = config.train.start_epoch * plan.steps_per_epoch
        if first >= plan.stop:
            raise ValueError(
                f"--start-epoch {config.train.start_epoch} begins at step {first} but --steps {plan.stop} ends before "
                "that: raise --steps"
            )
        return first, notes
    if config.train.restart:
        return 0, start_from_weights(path, trainee, config)
    try:
        first, changed = restore(path, trainee, config, plan, num_images, ranks.world_size)
    except CheckpointError:
        if (contents := find_moco_run(path)) is None:
            raise
        first, changed = restore_moco_run(contents, trainee, config, plan)
    complete = "; the run is complete" if first >= plan.stop else ""
    return first, [*notes, f"resuming from {path}, after {counted(first, 'step')}{complete}", *changed]


def start_from_weights(path: Path, trainee: Trainee, config: Config) -> list[str]:
    """Loads the query encoder from any checkpoint and copies it to the key encoder; queue and optimiser stay fresh.

    (The small-model project also keeps the checkpoint's queue, but a distilled student's queue holds its teacher's
    keys.) Returns notes on what was loaded. Raises CheckpointError when the backbone does not fit.
    """
    moco = trainee.moco
    first, *others = load_into(path, moco.encoder_q, config.model.arch, config.model.stem)
    moco.encoder_k.load_state_dict(moco.encoder_q.state_dict())
    return [f"starting from the {first}", *others]


def find_checkpoint(resume: str, folder: Path, ranks: Ranks) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, the same on every rank, and notes on newer ones that cannot be used."""
    if resume in ("no", ""):
        return None, []
    if resume != "auto":
        if Path(resume).is_dir():
            raise CheckpointError(f"{resume} is a folder: to resume the run in it, use --resume auto --output {resume}")
        return Path(resume), []
    notes: list[str] = []
    path = None
    if ranks.rank == 0:
        path = checkpoint.newest_good(folder / "checkpoints", notes)
    path, notes = broadcast_object((path, notes), ranks)
    if path is None and notes:
        raise CheckpointError(f"no checkpoint in {folder} can be used: {notes[-1]}")
    if path is None:
        return None, [f"nothing to resume in {folder}: starting from scratch"]
    return path, [f"{note}; using the one before it" for note in notes]


def restore(
    path: Path, trainee: Trainee, config: Config, plan: Plan, num_images: int, world_size: int
) -> tuple[int, list[str]]:
    """Loads a checkpoint into the run. Returns the steps already done and notes on settings that have changed.

    Raises CheckpointError when it belongs to another model.
    """
    state = checkpoint.load(path)
    check_fits(path, state["config"], config)
    try:
        trainee.moco.load_state_dict(state["model"])
        notes = keep_layout(trainee.moco, state, config)  # before the optimiser, whose buffers follow the weights
        load_optimizer_state(trainee.optimizer, state["optimizer"])
        if state["scaler"]:  # a run without fp16 has none; this one's begins anew
            trainee.scaler.load_state_dict(state["scaler"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} does not fit this model: {str(error).splitlines()[0]}") from error
    notes += describe_changes(state, config, num_images, world_size)
    first, moved = keep_epoch(state, config, plan)
    return first, notes + moved


def restore_moco_run(contents: Contents, trainee: Trainee, config: Config, plan: Plan) -> tuple[int, list[str]]:
    """Loads a run of MoCo's scripts with its key encoder, queue and momentum. Returns steps and notes as `restore`.

    Raises CheckpointError when it belongs to another model.
    """
    moco, m = trainee.moco, config.model
    run = read_moco_run(contents, m.arch, m.stem)
    dim, queue_size = run.model["queue"].shape[1], run.model["queue"].shape[0]
    then = {"head": run.head, "dim": dim, "queue_size": queue_size, "optimizer": "sgd", "exclude_norm_bias": False}
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


def keep_layout(moco: MoCo, state: dict, config: Config) -> list[str]:
    """Keeps the memory format of the checkpoint unless one was requested, so that the run continues bit for bit."""
    layouts = {name: layout for layout, name in LAYOUT_NAMES.items()}
    saved = layouts.get(state.get("layout"), moco.memory_format)
    if config.train.channels_last != "auto" or saved == moco.memory_format:
        return []
    moco.set_memory_format(saved)
    return [f"the encoders stay {LAYOUT_NAMES[saved]}, as in the checkpoint"]
