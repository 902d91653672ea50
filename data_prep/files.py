"""Writes files and folders whole or not at all: under another name, synced to the disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF)  # as network and FUSE file systems answer


def partial_path(path: Path) -> Path:
    """The name under which a file or folder is written until it is complete."""
    return path.with_name(path.name + ".partial")


@contextlib.contextmanager
def partial_file(path: Path) -> Iterator[BinaryIO]:
    """A new, empty file at `partial_path(path)`, deleted when the block fails; the caller syncs and renames it there.

    A file that a killed run left there is overwritten. Raises ValueError when another process is writing it.
    """
    partial = partial_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _on_failure(Path.unlink, partial), open(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "rb+") as file:
        _lock_partial(file.fileno(), partial)
        try:
            file.truncate(0)
            yield file
        except BaseException:
            with contextlib.suppress(OSError):
                file.close()  # tries once more to write what is left, and its error would hide the first
            raise


@contextlib.contextmanager
def partial_files(*paths: Path) -> Iterator[list[BinaryIO]]:
    """New files that get their names, in order, when the block ends: if the last exists, all exist and belong to it.

    When the block, the syncing or the renaming fails, no partial file is left. Raises ValueError as `partial_file`.
    """
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(partial_file(path)) for path in reversed(paths)][::-1]
        yield files
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        paths[-1].unlink(missing_ok=True)
        for path in paths:
            os.replace(partial_path(path), path)
        sync_folder(paths[-1].parent)


@contextlib.contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """Like `partial_file`, for a folder of files; the caller renames it inside the block."""
    partial = partial_path(path)
    with _on_failure(shutil.rmtree, partial), contextlib.ExitStack() as stack:
        partial.mkdir(parents=True, exist_ok=True)
        handle = os.open(partial, os.O_RDONLY)
        stack.callback(os.close, handle)
        _lock_partial(handle, partial)
        for left in partial.iterdir():
            left.unlink()
        yield partial


def lock(handle: int, path: Path) -> bool:
    """Locks an open file until it is closed or the process ends; False when another process has locked it.

    On a file system without locks (Lustre without the option flock, NFS without its lock daemon) it only says so.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        _say_unlocked(path.parent, error.strerror)
    return True


@functools.cache  # says it once for each folder
def _say_unlocked(folder: Path, why: str) -> None:
    tqdm.write(f"cannot lock files in {folder} ({why}): let only one process write there", file=sys.stderr)


def _lock_partial(handle: int, partial: Path) -> None:
    if not lock(handle, partial):
        raise ValueError(f"another process is writing {partial}: wait for it to end, or choose another name")


@contextlib.contextmanager
def _on_failure(remove: Callable[[Path], None], partial: Path) -> Iterator[None]:
    """Removes what the block made when it fails, unless another process writes it: a signal may end any line.

    remove: of files or of folders, for what is in the way may be the other, and stays.
    """
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            handle = os.open(partial, os.O_RDONLY)
            stack.callback(os.close, handle)
            if lock(handle, partial):
                remove(partial)
        _tell_where(error, partial.parent)
        raise


def _tell_where(error: BaseException, folder: Path) -> None:
    """Adds the folder to an error of the system without a file name, such as a full disk, and raises it again."""
    if isinstance(error, OSError) and error.strerror and error.filename is None:  # Pillow has OSErrors of its own
        raise OSError(error.errno, error.strerror, str(folder)) from error


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """`partial_path(path)`, to be written inside the block; it is renamed when that ends, and deleted when that fails.

    For small files that can be made again: nothing is synced or locked.
    """
    partial = partial_path(path)
    try:
        yield partial
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        _tell_where(error, path.parent)
        raise


def written_in_place(path: Path) -> bool:
    """Whether this is a link, a device or a pipe, such as /dev/stdout, which renaming a file would replace."""
    return path.is_symlink() or (path.exists() and not path.is_file())


def write_text(path: Path, text: str) -> None:
    """Writes a small file whole or not at all; but through a link, or to a device or pipe, just as the text comes."""
    if written_in_place(path):
        path.write_text(text)
        return
    with written_whole(path) as partial:
        partial.write_text(text)


def check_writable(path: str | Path, flag: str) -> None:
    """Raises ValueError if the file named by `flag` cannot be written: better before the work than after it."""
    if Path(path).is_dir():
        raise ValueError(f"{flag} {path} is a folder: give the name of a file")
    try:
        if written_in_place(Path(path)) and Path(path).exists():
            if not os.access(path, os.W_OK):
                raise OSError(errno.EACCES, os.strerror(errno.EACCES))
            return
        folder = Path(os.path.realpath(path)).parent
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be written ({error.strerror}): choose another place") from None


def sync_folder(folder: Path) -> None:
    """Syncs a folder, so that a rename in it survives a power cut; not where the file system syncs no folders."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
    finally:
        os.close(handle)


def refuse_existing(path: Path, force: bool) -> None:
    """Raises ValueError when the path is a folder, or exists without `force`."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the file to write")
    if path.exists() and not force:
        raise ValueError(f"{path} exists: add --force to replace it")


def file_sum(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()
