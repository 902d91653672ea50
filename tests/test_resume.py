"""A run that is killed and resumed is, bit for bit, the run that was never stopped.

Each start is a process, forked after its imports; test_slurm.py kills and resumes commands begun by an interpreter.
"""

import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from ranks import FORKS, redirect_output
from tqdm import tqdm

from fastssl import checkpoint, train
from fastssl.build import make_trainee
from fastssl.command import FAILED, PREEMPTED, run_command
from fastssl.config import Config, replace
from fastssl.distributed import Ranks
from fastssl.plan import make_plan
from fastssl.resume import start_or_resume, state_of

FLAGS = (
    "-a resnet18 --head dropout --image-size 32 -b 8 --accumulate 2 --bn-splits 2 --queue-size 37 --dim 16 "
    "--policy v2 --cos --warmup-epochs 1 --clip-grad 5 --epochs 4 --log-every 1 --knn-every 2 --deterministic "
    "--device cpu --seed 5 --keep-last 2 --save-every-epochs 3"
).split()


def run_command_line(log: str, argv: list[str]) -> None:
    """The command in a process of its own, all it says in the file `log`."""
    redirect_output(log)
    tqdm.set_lock(threading.RLock())  # its own would be a semaphore that a killed process leaves behind
    torch.set_num_threads(1)
    sys.exit(run_command(train.main, argv))


def start(data: Path, output: Path, *flags: str) -> BaseProcess:
    argv = [str(data), *FLAGS, "--output", str(output), *flags]
    process = FORKS.Process(target=run_command_line, args=(str(log_of(output)), argv), name=output.name, daemon=True)
    process.start()
    return process


def log_of(output: Path) -> Path:
    return output.with_suffix(".log")


def finish(process: BaseProcess, output: Path, code: int) -> str:
    process.join(timeout=300)
    said = log_of(output).read_text()
    assert process.exitcode == code, said
    return said


def metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without the fields that tell the time."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "seconds")} for line in lines]


def fingerprint(state):
    """Every leaf of a checkpoint by its path, in a fixed order: what two runs must agree on."""

    def walk(prefix, value):
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                yield from walk(f"{prefix}.{key}", value[key])
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                yield from walk(f"{prefix}.{i}", item)
        else:
            yield prefix, value

    yield from walk("", state)


def digest(folder: Path) -> str:
    """SHA-256 over every tensor and number of the newest checkpoint."""
    sha = hashlib.sha256()
    path = next(iter(checkpoint.saved_steps(folder / "checkpoints").values()))
    for name, value in fingerprint(checkpoint.load(path)):
        if not name.startswith(".config."):
            sha.update(name.encode())
            sha.update(value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())
    return sha.hexdigest()


def kill_at(process: BaseProcess, folder: Path, step: int, signum: int) -> None:
    """Sends the signal once `step` is in the log."""
    while process.is_alive():
        if (folder / "metrics.jsonl").exists() and any(line["step"] >= step for line in metrics(folder)):
            os.kill(process.pid, signum)
            return
        time.sleep(0.01)
    raise AssertionError(log_of(folder).read_text())


@pytest.fixture(scope="module")
def data(make_image_folder, tmp_path_factory):
    return make_image_folder(tmp_path_factory.mktemp("resume"), {"train": 11, "val": 4})


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    finish(start(data, folder), folder, 0)
    return folder


def test_killed_twice_in_the_middle_of_an_epoch_and_resumed(data, uninterrupted, tmp_path):
    folder = tmp_path / "killed"
    total = metrics(uninterrupted)[-1]["step"]
    assert total == 16  # 33 images: 4 steps an epoch, one image dropped
    first, second = sorted(random.SystemRandom().sample(range(2, total - 6), 2))
    process = start(data, folder)
    kill_at(process, folder, first, signal.SIGTERM)
    assert "continue with --resume auto" in finish(process, folder, PREEMPTED)
    process = start(data, folder, "--resume", "auto")
    kill_at(process, folder, max(second, metrics(folder)[-1]["step"] + 1), signal.SIGUSR1)
    finish(process, folder, PREEMPTED)
    text = finish(start(data, folder, "--resume", "auto"), folder, 0)
    assert "resuming from" in text
    assert metrics(folder) == metrics(uninterrupted), (first, second)
    assert digest(folder) == digest(uninterrupted), (first, second)


def test_killed_without_warning_and_the_newest_checkpoint_damaged(data, uninterrupted, tmp_path):
    """kill -9 after lines that no checkpoint covers, then a torn newest file: the one before it is used."""
    folder = tmp_path / "torn"
    process = start(data, folder, "--save-every-steps", "3")
    kill_at(process, folder, 10, signal.SIGKILL)
    finish(process, folder, -signal.SIGKILL)
    newest, older = list(checkpoint.saved_steps(folder / "checkpoints").items())[:2]
    newest[1].write_bytes(newest[1].read_bytes()[:-5000])
    text = finish(start(data, folder, "--resume", "auto"), folder, 0)
    assert f"{newest[1].name} is damaged" in text and older[1].name in text
    assert metrics(folder) == metrics(uninterrupted)
    assert digest(folder) == digest(uninterrupted)


def test_a_finished_run_resumes_to_nothing_and_an_old_folder_is_not_overwritten(data, uninterrupted):
    before = digest(uninterrupted)
    text = finish(start(data, uninterrupted), uninterrupted, FAILED)
    assert "already holds a run, saved after step 16: add --resume auto" in text
    text = finish(start(data, uninterrupted, "--resume", "auto", "-a", "resnet34"), uninterrupted, FAILED)
    assert "was trained with --arch resnet18 but this run has resnet34" in text
    assert digest(uninterrupted) == before


@pytest.fixture
def small(tmp_path):
    """`small(saved_by, **changed)`: what is told when a tiny run of so many processes goes on, options changed."""
    config = replace(Config(), arch="resnet18", queue_size=8, dim=8, batch_size=8, device="cpu", channels_last="on")
    ranks = Ranks(0, 1, torch.device("cpu"))
    trainee = make_trainee(config, ranks)

    def go_on(saved_by=1, **changed):
        path = tmp_path / "checkpoint.pt"
        checkpoint.save(state_of(trainee, 3, config, 24, saved_by), path)
        resumed = replace(config, resume=str(path), **changed)
        step, notes = start_or_resume(resumed, make_plan(config, 3), trainee, tmp_path, 24, ranks)
        assert step == 3
        return " ".join(notes)

    return go_on


def test_what_was_changed_is_told_where_it_touches_a_weight(small):
    assert "lr is now 1.0 and was 0.03: the run continues, but differs from one that was never stopped" in small(lr=1.0)
    assert "the run continues" not in small(read_ahead=3, beton_cache="process", val="elsewhere", log_every=7)


@pytest.mark.parametrize("saved_by", [1, 2])
def test_another_number_of_processes_is_named(small, saved_by):
    note = "the world size is now 1 and was 2: batch norm and the uniform loss see other parts of a batch"
    assert (note in small(saved_by)) is (saved_by == 2)
    shards = f"{note} and, by --resident-shard, each rank other images"
    assert (shards in small(saved_by, loader="resident", resident_shard=True)) is (saved_by == 2)
