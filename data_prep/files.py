"""Files that are there whole or not at all: written beside their name, made to last, then renamed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def partial_path(path: Path) -> Path:
    """Where a file or folder lies until it is whole."""
    return path.with_name(path.name + ".partial")


@contextlib.contextmanager
def partial_file(path: Path) -> Iterator[BinaryIO]:
    """A new, empty file at `partial_path(path)`, safe on the disk when the block ends; gone when it fails.

    What a killed run left there is overwritten. Raises ValueError when another process is writing it.
    """
    partial = partial_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "rb+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing {partial}: wait for it, or choose another name") from None
        try:
            file.truncate(0)
            yield file
            file.flush()
            os.fsync(file.fileno())
        except BaseException as error:
            partial.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.filename is None:  # "no space left on device": where?
                raise OSError(error.errno, error.strerror, str(partial.parent)) from error
            raise


def publish(*paths: Path) -> None:
    """Gives partial files their names, the last one last: where that one is, the others are whole and belong to it."""
    paths[-1].unlink(missing_ok=True)
    for path in paths:
        os.replace(partial_path(path), path)
    sync_folder(paths[-1].parent)


def sync_folder(folder: Path) -> None:
    """Makes a rename last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def refuse_existing(path: Path, force: bool) -> None:
    """Raises ValueError where the path is taken and may not be replaced."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the file to write")
    if path.exists() and not force:
        raise ValueError(f"{path} exists: --force replaces it")


def file_sum(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()
