"""Small files are written whole or not at all, and what is no file of ours is not renamed away."""

import os
from pathlib import Path

import pytest

from fastssl.data_prep.files import check_writable, write_text


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
