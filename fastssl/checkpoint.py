"""Checkpoint files: written whole or not at all, and checked before they are used.

A checkpoint is a dict of tensors, numbers and strings, {format, step, config, model, optimizer, scaler, ...}, and is
only ever read with `weights_only=True`.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

from fastssl.data_prep.files import sync_folder, written_whole

FORMAT = 1
PARTS = ("format", "step", "config", "num_images", "model", "optimizer", "scaler")


class CheckpointError(ValueError):
    """A checkpoint cannot be written, read or used."""


class OtherVersionError(CheckpointError):
    """A checkpoint is intact but was written by another version of this program."""


def save(state: dict, path: Path) -> None:
    """Writes a checkpoint with torch.save, atomically. Raises CheckpointError when that fails."""
    write_whole(path, lambda file: torch.save(state, file))


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Creates `path` with what `write` puts into the file, atomically: Ctrl-C or a full disk leaves no partial file.

    Raises CheckpointError when the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as partial, open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(path.parent)
    except BaseException as error:
        hidden = isinstance(error.__context__, (OSError, KeyboardInterrupt))  # by torch.save: the disk's, or Ctrl-C
        refusal = error.__context__ if hidden else error
        if not isinstance(refusal, (OSError, RuntimeError)):
            raise refusal from None
        cause = f"{type(refusal).__name__}: {str(refusal).splitlines()[0]}"
        raise CheckpointError(
            f"cannot write {path} ({cause}); earlier checkpoints are untouched: free some space or choose another place"
        ) from error


def load(path: Path) -> dict:
    """Reads a checkpoint, with its tensors on the CPU, after checking its checksums and that no part is missing.

    Raises CheckpointError that says what is wrong with it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load would accept flipped bits silently
        if damaged:
            raise CheckpointError(f"{path} is damaged: {damaged} fails its checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"the checkpoint {path} does not exist") from None
    except pickle.UnpicklingError:  # whose own advice is to run what the file holds
        raise CheckpointError(
            f"{path} is damaged or not a checkpoint of fastssl, since it holds more than weights and numbers: add "
            "--restart to start from its weights alone"
        ) from None
    except Exception as error:
        reason = str(error).splitlines()[0][:200]
        raise CheckpointError(f"{path} is damaged or not a checkpoint: {reason}") from error
    if not isinstance(state, dict) or any(part not in state for part in PARTS):
        raise CheckpointError(
            f"{path} is not a fastssl checkpoint: it lacks some of {', '.join(PARTS)}; "
            "add --restart to start from its weights alone"
        )
    if state["format"] != FORMAT:
        raise OtherVersionError(
            f"{path} has format {state['format']} but this version reads format {FORMAT}: "
            "continue with the version that wrote it, or choose another --output"
        )
    return state


def name(step: int) -> str:
    """The file name of the checkpoint saved after `step` steps."""
    return f"step_{step:09d}.pt"


def saved_steps(folder: Path) -> dict[int, Path]:
    """The checkpoints in a folder by step, newest first."""
    found = {}
    for path in folder.glob("step_*.pt"):
        if match := re.fullmatch(r"step_(\d+)\.pt", path.name):
            found[int(match[1])] = path
    return dict(sorted(found.items(), reverse=True))


def newest_good(folder: Path, report: list[str]) -> Path | None:
    """The newest intact checkpoint; what is wrong with newer ones is appended to `report`.

    None when there is none, or when another version of this program wrote a newer one.
    """
    for path in saved_steps(folder).values():
        try:
            load(path)
            return path
        except CheckpointError as error:
            report.append(str(error))
            if isinstance(error, OtherVersionError):  # resuming from an older one would overwrite it
                return None
    return None


def find(source: str | Path) -> Path:
    """The file itself, or the newest intact checkpoint of a run folder. Raises CheckpointError when it has none."""
    path = Path(source)
    if not path.is_dir():
        return path
    notes: list[str] = []
    newest = newest_good(path / "checkpoints", notes)
    if newest is None:
        reason = notes[-1] if notes else "name a run folder or a checkpoint"
        raise CheckpointError(f"{path} holds no usable checkpoint: {reason}")
    return newest


def prune(folder: Path, newest: int, keep_last: int, keep_multiple: int) -> None:
    """Deletes all but `keep_last` of the checkpoints up to step `newest`, and the multiples of `keep_multiple` steps.

    keep_multiple: 0 for none. Checkpoints after `newest` are damaged, or the run would not have gone back so far.
    """
    saved = [(step, path) for step, path in saved_steps(folder).items() if step <= newest]
    for step, path in saved[keep_last:]:
        if not keep_multiple or step % keep_multiple:
            path.unlink(missing_ok=True)
