"""The folder of a run: chosen before anything is read, locked, and cut to where the run goes on."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from fastssl import checkpoint
from fastssl.config import Config, replace
from fastssl.data_prep.files import lock, write_text
from fastssl.distributed import Ranks, broadcast_object


def choose_folder(config: Config, ranks: Ranks) -> tuple[Path, Config]:
    """The run folder, the same on every rank: --output, or runs/<arch>-<date>-<time>.

    Also returns `config`, with --resume auto:PATH decided: it is PATH until the folder holds a checkpoint, then auto.
    Raises ValueError when a new run would be mixed into the folder of an old one.
    """
    t = config.train
    auto, _, begin = t.resume.partition(":")
    if not t.output and auto == "auto":
        raise ValueError("--resume auto needs --output, the folder of the run to resume")
    default = f"runs/{config.model.arch}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(broadcast_object(t.output or default, ranks))
    if not writable(folder):
        raise ValueError(f"--output {folder} is not a folder that can be written: choose another place")
    saved = broadcast_object(checkpoint.saved_steps(folder / "checkpoints"), ranks)
    if auto != "auto" and saved:
        raise ValueError(
            f"{folder} already holds a run, saved after step {max(saved)}: "
            "add --resume auto to continue it, or choose another --output"
        )
    if auto == "auto" and begin:
        config = replace(config, resume="auto", restart=False) if saved else replace(config, resume=begin)
    return folder, config


def writable(folder: Path) -> bool:
    """Whether this is a folder, or can become one, in which we may write."""
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


@contextlib.contextmanager
def says_where(folder: Path) -> Iterator[None]:
    """Turns an OSError inside the block into a ValueError that names the folder and its option."""
    try:
        yield
    except OSError as error:
        mend = "free some space or choose another place"
        raise ValueError(f"--output {folder} cannot be written ({error.strerror or error}): {mend}") from error


def lock_file(path: Path) -> TextIO:
    """The open file, locked until it is closed or the process ends. Raises ValueError when another run locks it."""
    file = open(path, "w")  # noqa: SIM115 (open as long as the run)
    if not lock(file.fileno(), path):
        file.close()
        raise ValueError(f"another run is writing to {path.parent}: wait, or choose another --output")
    return file


def trim_metrics(path: Path, first: int) -> tuple[set[str], float]:
    """Drops the lines after step `first`, which a resumed run writes again, and an incomplete last line; 0 drops all.

    Returns the names of what the remaining lines record of that step, and the seconds of training up to the last.
    """
    kept, names, seconds = [], set[str](), 0.0
    if not path.exists():
        return names, seconds
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if record["step"] <= first:
                kept.append(line + "\n")
                seconds = record.get("seconds", seconds)
            if record["step"] == first:
                names |= record.keys()
    write_text(path, "".join(kept))
    return names, seconds
