"""Checkpoints that survive: written whole or not at all, checked before they are trusted.

A checkpoint is a dict of tensors, numbers and strings: {format, step, config, model, optimizer, scaler, ...},
read only with `weights_only=True`.
"""

from __future__ import annotations

import contextlib
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

from fastssl.data_prep.files import sync_folder

FORMAT = 1
PARTS = ("format", "step", "config", "num_images", "model", "optimizer", "scaler")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read or used here."""


class OtherVersionError(CheckpointError):
    """A checkpoint is whole, and another version of this program wrote it."""


def save(state: dict, path: Path) -> None:
    """Writes atomically, by torch.save. Raises CheckpointError when the disk refuses."""
    write_whole(path, lambda file: torch.save(state, file))


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """A file as `write` fills it, or none: a kill or a full disk leaves earlier checkpoints as they were.

    Raises CheckpointError when the disk refuses.
    """
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        cause = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise CheckpointError(
            f"could not write {path} ({cause}); earlier checkpoints are untouched: make room, or name another place"
        ) from error


def load(path: Path) -> dict:
    """Reads and checks a checkpoint: its bytes by their CRC, its parts by name. Tensors on the CPU.

    Raises CheckpointError that says what is wrong with it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load itself would read flipped bits without a word
        if damaged:
            raise CheckpointError(f"{path} is damaged: {damaged} fails its checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}") from None
    except Exception as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint: {str(error).splitlines()[0][:200]}") from error
    if not isinstance(state, dict) or any(part not in state for part in PARTS):
        lacking = f"it lacks some of {', '.join(PARTS)}"
        raise CheckpointError(f"{path} is not a fastssl checkpoint: {lacking}; --restart starts from its weights alone")
    if state["format"] != FORMAT:
        wrote = f"{path} has format {state['format']}, this version reads {FORMAT}"
        raise OtherVersionError(f"{wrote}: go on with the version that wrote it, or with another --output")
    return state


def name(step: int) -> str:
    """File name of the checkpoint taken after `step` steps."""
    return f"step_{step:09d}.pt"


def saved_steps(folder: Path) -> dict[int, Path]:
    """The checkpoints of a folder by step, newest first."""
    found = {int(m[1]): path for path in folder.glob("step_*.pt") if (m := re.fullmatch(r"step_(\d+)\.pt", path.name))}
    return dict(sorted(found.items(), reverse=True))


def newest_good(folder: Path, report: list[str]) -> Path | None:
    """The newest checkpoint that can be trusted; what is wrong with newer ones goes into `report`.

    None where there is none, or where another version of this program wrote a newer one.
    """
    for path in saved_steps(folder).values():
        try:
            load(path)
            return path
        except CheckpointError as error:
            report.append(str(error))
            if isinstance(error, OtherVersionError):  # going on from an older one would overwrite it
                return None
    return None


def find(source: str | Path) -> Path:
    """The file itself, or the newest good checkpoint of a run folder. Raises CheckpointError where it has none."""
    path = Path(source)
    if not path.is_dir():
        return path
    notes: list[str] = []
    newest = newest_good(path / "checkpoints", notes)
    if newest is None:
        raise CheckpointError(f"{path} holds no checkpoint that can be used" + (f": {notes[-1]}" if notes else ""))
    return newest


def prune(folder: Path, keep_last: int, keep_multiple: int) -> None:
    """Removes all but the newest `keep_last` checkpoints and those at a multiple of `keep_multiple` steps (0: none)."""
    for step, path in list(saved_steps(folder).items())[keep_last:]:
        if not keep_multiple or step % keep_multiple:
            path.unlink(missing_ok=True)
