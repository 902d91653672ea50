"""fastssl prep ends in order: after Ctrl-C, SIGTERM or a kill there is no traceback, no process and no half file."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prep_images import jpeg, write_kinds

from fastssl import cli
from fastssl.data_prep import files
from fastssl.data_prep.prepare import Store
from fastssl.data_prep.sources import Selection
from fastssl.data_prep.work_pool import Work
from fastssl.data_prep.write_beton import write_beton

OUT = {"beton": "out.beton", "shards": "out", "views": "out"}
LISTING = {"beton": "out.beton.images.jsonl.partial", "shards": "out.partial/images.jsonl.partial"}
SAID = {signal.SIGINT: "fastssl: interrupted\n", signal.SIGTERM: "fastssl: terminated\n"}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """So many images, with names so long, that the listing reaches the disk midway: Python 3.14 buffers 128 KiB."""
    names = map("{:0240}.jpg".format, range(900))
    return write_kinds(tmp_path_factory.mktemp("many"), dict.fromkeys(names, (jpeg(400, 400), "")))


@contextlib.contextmanager
def start(images: Path, folder: Path, kind: str) -> Iterator[subprocess.Popen]:
    """`fastssl prep` in a session, and so a process group, of its own, as a terminal would start it."""
    command = [sys.executable, "-m", "fastssl", "prep", kind, str(images), str(folder / OUT[kind]), "--workers", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):  # only a failed test finds it
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(process: subprocess.Popen, listing: Path, moment: str) -> None:
    """Until its processes are being started, or until it has images."""
    deadline = time.monotonic() + 60
    while not listing.exists() or (moment == "in the middle" and not listing.stat().st_size):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)


def session_members(session: int) -> list[int]:
    """Processes of a session that still run."""
    found = []
    for entry in os.listdir("/proc"):
        try:
            text = Path("/proc", entry, "stat").read_text() if entry.isdigit() else ""
        except OSError:
            continue
        state = text.rpartition(")")[2].split()
        if state and int(state[3]) == session and state[0] != "Z":
            found.append(int(entry))
    return found


def wait_for_members(session: int) -> None:
    deadline = time.monotonic() + 60
    while session_members(session):
        assert time.monotonic() < deadline, "processes live on"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("kind", "number", "moment", "send"),
    [
        ("beton", signal.SIGINT, "at the start", os.killpg),
        ("beton", signal.SIGTERM, "in the middle", os.killpg),
        ("shards", signal.SIGTERM, "at the start", os.kill),
        ("shards", signal.SIGINT, "in the middle", os.killpg),
    ],
)
def test_a_signal_ends_it_with_one_sentence(images, tmp_path, kind, number, moment, send):
    """To its group, as a terminal sends it, or to one process, as `kill PID` or a service manager does."""
    with start(images, tmp_path, kind) as process:
        wait_for(process, tmp_path / LISTING[kind], moment)
        send(process.pid, number)
        assert process.communicate(timeout=60) == ("", SAID[number])
        wait_for_members(process.pid)
    assert process.returncode == 128 + number
    assert not os.listdir(tmp_path)


def test_a_signal_leaves_whole_views_that_the_same_command_completes(images, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/red").symlink_to(images)
    with start(tmp_path / "in", tmp_path, "views") as process:
        wait_for(process, tmp_path / "out/red", "at the start")
        process.terminate()
        assert process.communicate(timeout=60) == ("", SAID[signal.SIGTERM])
        wait_for_members(process.pid)
    assert not list(tmp_path.rglob("*.partial"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/*-2.jpeg")}
    assert len(before) < 50
    with start(tmp_path / "in", tmp_path, "views") as process:
        assert "50 images with 2 views each" in process.communicate(timeout=60)[0]
    assert before.items() <= {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/*-2.jpeg")}.items()


@pytest.mark.parametrize("moment", ["_lock_partial", "lock"])
@pytest.mark.parametrize("opened", [files.partial_file, files.partial_folder])
def test_a_signal_while_a_file_is_opened_leaves_nothing(tmp_path, monkeypatch, opened, moment):
    """Before the lock, and after it."""

    def interrupted(*arguments):
        monkeypatch.undo()
        if moment == "lock":
            files.lock(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(files, moment, interrupted)
    with pytest.raises(KeyboardInterrupt), opened(tmp_path / "out"):
        pass
    assert not os.listdir(tmp_path)


def test_what_another_writes_stays(tmp_path):
    with files.partial_file(tmp_path / "out") as file:
        file.write(b"the first's")
        file.flush()
        with pytest.raises(ValueError, match="another process is writing"), files.partial_file(tmp_path / "out"):
            pass
        assert (tmp_path / "out.partial").read_bytes() == b"the first's"


def test_what_is_in_the_way_of_a_partial_file_stays(tmp_path):
    (tmp_path / "a.partial" / "folder").mkdir(parents=True)
    (tmp_path / "b.partial").write_text("a file")
    for opened, name in ((files.partial_file, "a"), (files.partial_folder, "b")):
        with pytest.raises(OSError, match=rf"{name}\.partial"), opened(tmp_path / name):
            pass
    assert (tmp_path / "a.partial" / "folder").is_dir() and (tmp_path / "b.partial").read_text() == "a file"


def test_a_second_signal_ends_it_at_once(images, tmp_path):
    with start(images, tmp_path, "beton") as process:
        wait_for(process, tmp_path / LISTING["beton"], "in the middle")
        for _ in range(2):
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.01)
        assert "Traceback" not in process.communicate(timeout=60)[1]
        wait_for_members(process.pid)
    assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT)
    assert all(name.endswith(".partial") for name in os.listdir(tmp_path))


def test_ctrl_c_during_the_imports_is_one_sentence_too(monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", interrupted)
    assert cli.main(["prep", "beton"]) == 130
    assert capsys.readouterr().err == SAID[signal.SIGINT]


def test_a_kill_leaves_no_file_and_no_process(images, tmp_path):
    with start(images, tmp_path, "beton") as process:
        wait_for(process, tmp_path / LISTING["beton"], "in the middle")
        process.kill()
        process.wait()
        left = ["out.beton.images.jsonl.partial", "out.beton.json.partial", "out.beton.partial"]
        assert sorted(os.listdir(tmp_path)) == left
        wait_for_members(process.pid)
    write_beton(images, tmp_path / OUT["beton"], Store(originals=True), Selection(count=3), Work(workers=1))
    assert sorted(os.listdir(tmp_path)) == ["out.beton", "out.beton.images.jsonl", "out.beton.json"]
