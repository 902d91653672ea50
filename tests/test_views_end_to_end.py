"""A static view set from the images to the figures: the same files however it was made, then every evaluation."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from old_checkpoints import make_moco
from torch import save

from fastssl.cli import main
from fastssl.data_prep import static_views
from fastssl.data_prep.find import find_images
from fastssl.data_prep.static_views import draw, make_static_views
from fastssl.data_prep.view_pairs import AUGS, count_views

ROOT = Path(__file__).parents[1]
MASKED = ("normal", "g-mask", "rand-g-mask", "avg-mask", "rand-avg-mask")


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_every_mode_is_the_same_on_two_processes(image_folder, tmp_path):
    """One pool for all modes: starting processes takes longer than what they do."""
    jobs = []
    for aug in AUGS:
        make_static_views(str(image_folder / "train"), str(tmp_path / "one" / aug), aug, 2, workers=1)
        options = {"aug": aug, "seed": 0, "quality": 75}
        found = static_views._jobs(find_images(str(image_folder / "train")), str(tmp_path / "two" / aug), options)
        jobs += [job for of_class in found.values() for job in of_class[:2]]
    assert len(jobs) == 6 * len(AUGS)
    assert not [outcome.error for outcome in static_views._run(jobs, 2) if outcome.error]
    for aug in AUGS:
        one = contents(tmp_path / "one" / aug)
        assert one == contents(tmp_path / "two" / aug)
        numbers = range(1 + count_views(aug))
        assert set(one) == {f"class{c}/{i}-{v}.jpeg" for c in range(3) for i in range(2) for v in numbers}


def test_a_killed_set_is_finished_and_its_processes_end(image_folder, tmp_path):
    arguments = [str(image_folder / "train"), "--aug", "easy", "--images-per-class", "8"]
    data, *flags = arguments
    views = [sys.executable, "-m", "fastssl", "prep", "views"]
    command = [*views, data, str(tmp_path / "killed"), *flags, "--workers", "2"]
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT
    )
    deadline = time.monotonic() + 100
    while len(list(tmp_path.glob("killed/*/*.jpeg"))) < 30:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while session_alive(process.pid):  # the workers notice
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert 30 <= len(list(tmp_path.glob("killed/*/*.jpeg"))) < 24 * 11
    assert main(["prep", "views", data, str(tmp_path / "killed"), *flags, "--workers", "1"]) == 0
    assert main(["prep", "views", data, str(tmp_path / "whole"), *flags, "--workers", "1"]) == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def session_alive(leader: int) -> bool:
    """Whether a process of that session still runs."""
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text()
            except OSError:
                continue  # gone
            state, _, _, session = stat.rpartition(")")[2].split()[:4]
            if int(session) == leader and state != "Z":
                return True
    return False


def test_every_evaluation_of_the_set_it_wrote(image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save(make_moco("mobilenetv3_small")[0], "moco.pth.tar")
    assert main(["prep", "views", str(image_folder / "train"), "set", "--aug", "hard", "--workers", "1"]) == 0
    encoder = "-a mobilenetv3_small --pretrained moco.pth.tar --image-size 32 -b 16 --device cpu".split()
    found = {}
    modes = ["--mode", "sd-sd", "--dataset-mode", "all"]
    for name, flags in {
        "instdisc": ["-s", "8", "--topk", "20", *modes], "stats": ["-s", "8"], "tsne": ["--perplexity", "5"],
    }.items():  # fmt: skip
        assert main(["eval", name, "set", *encoder, *flags, "--json", f"{name}.json"]) == 0
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())
    assert tuple(found["instdisc"]["accuracy"]) == MASKED and found["stats"]["samples"] == 24
    assert len({tuple(a) for a in found["instdisc"]["accuracy"].values()}) > 1  # masks change what is found
    assert all((tmp_path / name).is_file() for name in found["tsne"]["files"])
    more = ["--views", "set", "-s", "8", "--topk", "20", "-k", "3", "--epochs", "2", "--lrs", "1", "--perplexity", "5"]
    assert main(["eval", "all", str(image_folder), *encoder, *more, "--json", "all.json"]) == 0
    together = json.loads((tmp_path / "all.json").read_text())
    assert together["instdisc"]["sd-sd"] == found["instdisc"]["accuracy"]["normal"]
    assert together["stats"]["SD-SD align"] == pytest.approx(found["stats"]["SD-SD align"], rel=1e-6)
    assert "24 images with 10 views" in capsys.readouterr().out
    hole = tmp_path / "set" / "class1" / "3-7.jpeg"
    hole.unlink()
    assert main(["eval", "instdisc", "set", *encoder, "-s", "8", "--dataset-mode", "avg-mask"]) == 1
    err = capsys.readouterr().err
    assert "3-7.jpeg is missing, so mode avg-mask is incomplete" in err


def test_an_image_that_kills_its_process_is_left_out(image_folder, tmp_path, monkeypatch):
    shutil.copytree(image_folder / "train" / "class0", tmp_path / "data" / "class0")
    monkeypatch.setattr(static_views, "draw", draw_or_die)
    notes = make_static_views(str(tmp_path / "data"), str(tmp_path / "set"), "moco", 3, workers=2)
    assert len(notes) == 1 and "class0/1.jpg: its decoder crashes" in notes[0]
    assert {p.name for p in (tmp_path / "set" / "class0").glob("*-0.jpeg")} == {"0-0.jpeg", "2-0.jpeg", "3-0.jpeg"}


def draw_or_die(job):
    if job.source.endswith("1.jpg"):
        os.kill(os.getpid(), signal.SIGKILL)
    return draw(job)
