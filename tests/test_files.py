"""Files are written whole or not at all, and what is no file of ours is not renamed away."""

import errno
import fcntl
import os
import stat
from pathlib import Path

import pytest

from fastssl.data_prep.files import check_writable, lock, partial_files, partial_folder, sync_folder, write_text


def test_a_failed_write_leaves_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_text(path, "old")

    def fail(partial, text):
        partial.write_bytes(text[:1].encode())
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fail)
        with pytest.raises(OSError, match="no space"):
            write_text(path, "new")
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]


def test_a_link_and_a_pipe_are_written_to_and_not_replaced(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "text"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "text")
    assert os.read(reader, 9) == b"text" and (tmp_path / "pipe").is_fifo()
    os.close(reader)


def test_what_can_be_written_is_found_before_and_nothing_is_left(tmp_path):
    (tmp_path / "a.json.partial").write_text("of somebody else")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "ahead").symlink_to(tmp_path / "not there yet")
    for name in ("a.json", "pipe", "link", "ahead", "new/b.json"):
        check_writable(tmp_path / name, "--json")
    assert sorted(os.listdir(tmp_path)) == ["a.json.partial", "ahead", "link", "new", "pipe"]
    assert (tmp_path / "a.json.partial").read_text() == "of somebody else"
    with pytest.raises(ValueError, match=r"--json \S+/x\.json cannot be written"):
        check_writable(tmp_path / "a.json.partial" / "x.json", "--json")
    with pytest.raises(ValueError, match="is a folder"):
        check_writable(tmp_path, "--json")


@pytest.mark.parametrize(("call", "number"), [("fsync", 1), ("fsync", 2), ("fsync", 3), ("replace", 1)])
def test_files_that_belong_together_are_there_all_or_none(tmp_path, monkeypatch, call, number):
    """Whatever ends them after their last byte: Ctrl-C, a full disk."""
    paths, calls, real = [tmp_path / name for name in "abc"], [], getattr(os, call)

    def interrupted(*args):
        calls.append(args)
        if len(calls) == number:
            raise KeyboardInterrupt
        return real(*args)

    def write():
        with partial_files(*paths) as files:
            for file, text in zip(files, (b"first", b"second", b"last")):
                file.write(text)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, call, interrupted)
        write()
    assert not os.listdir(tmp_path)
    write()
    assert [path.read_bytes() for path in paths] == [b"first", b"second", b"last"]
    assert len(os.listdir(tmp_path)) == 3


@pytest.mark.parametrize("number", range(3))
def test_a_disk_that_is_full_at_the_last_byte_is_named(tmp_path, number):
    full = os.open("/dev/full", os.O_WRONLY)
    with (
        pytest.raises(OSError, match=r"No space left on device: .*test_a_disk"),
        partial_files(*(tmp_path / name for name in "abc")) as files,
    ):
        os.dup2(full, files[number].fileno())
        files[number].write(b"still in memory when the block ends")
    os.close(full)
    assert not os.listdir(tmp_path)


def test_a_file_system_without_locks_and_without_syncs_of_folders(tmp_path, monkeypatch, capsys):
    """Lustre without the option flock; several FUSE file systems."""
    fsync = os.fsync

    def no_locks(handle, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    def fsync_of_files(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(os, "fsync", fsync_of_files)
    with partial_files(tmp_path / "a", tmp_path / "b"):
        pass
    with partial_folder(tmp_path / "folder") as partial:
        partial.rename(tmp_path / "folder")
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "folder"]
    notice = f"cannot lock files in {tmp_path} (Function not implemented): let only one process write there\n"
    assert capsys.readouterr().err == notice


def test_a_lock_is_one_process_s(tmp_path):
    with open(tmp_path / "lock", "w") as ours, open(tmp_path / "lock", "w") as theirs:
        assert lock(ours.fileno(), tmp_path / "lock") and not lock(theirs.fileno(), tmp_path / "lock")
    with open(tmp_path / "lock", "w") as later:
        assert lock(later.fileno(), tmp_path / "lock")


def test_another_error_of_a_folder_s_sync_is_raised(tmp_path, monkeypatch):
    def fail(handle):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        sync_folder(tmp_path)
