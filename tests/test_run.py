"""The record of a run: what counts as training time, and what is shown."""

import json
import math
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastssl import checkpoint
from fastssl import run as run_module
from fastssl.augment.policy import make_policy
from fastssl.config import Config, replace
from fastssl.distributed import Ranks
from fastssl.loaders.make import make_loader
from fastssl.plan import make_plan
from fastssl.run import Run


def open_run(folder, first=0, own=True):
    """own: after its first step a run goes on from a checkpoint in its folder, not from one elsewhere."""
    if first and own:
        (folder / "checkpoints").mkdir(exist_ok=True)
        (folder / "checkpoints" / checkpoint.name(first)).touch()
    config = replace(Config(), image_size=32)
    return Run(folder, config, make_plan(config, 3), first, Ranks(0, 1, torch.device("cpu")))


def test_the_picture_of_views_is_drawn_off_the_clock(tmp_path, monkeypatch):
    record = open_run(tmp_path)
    monkeypatch.setattr(run_module, "save_preview", lambda *_: time.sleep(0.5))
    loader = make_loader("synthetic", "", batch_size=2, seed=0, device="cpu", synthetic_images=8, synthetic_size=40)
    before = record.clock.seconds()
    record.preview(loader, make_policy("v2"))
    assert record.clock.seconds() - before < 0.4
    record.close()


def test_the_answer_of_the_probe_is_shown(tmp_path, capsys):
    record = open_run(tmp_path)
    record.probe(3, lambda backbone: 100 / 3, None)
    record.close()
    assert "step 3/600  knn 33.33 %\n" in capsys.readouterr().err
    assert '"knn": 33.33333' in (tmp_path / "metrics.jsonl").read_text()


def test_a_probe_without_an_answer_is_no_reason_to_stop(tmp_path, capsys):
    record = open_run(tmp_path)
    record.probe(3, lambda backbone: math.nan, None)
    record.close()
    assert "step 3/600  no knn: features are not finite in evaluation" in capsys.readouterr().err
    assert "knn" not in (tmp_path / "metrics.jsonl").read_text()


def test_the_time_of_a_run_that_goes_on_counts_on(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(run_module.time, "perf_counter", lambda: now)

    def train(first, seconds):
        """Two records, each of 3 steps that take so many seconds; returns (step, seconds, images/s) of all lines."""
        nonlocal now
        record = open_run(tmp_path, first)
        for steps in (3, 6):
            now += seconds
            record.log(first + steps, {})
        record.close()
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line["seconds"], line["images_per_second"]) for line in lines]

    assert train(0, 10) == [(3, 10, 38.4), (6, 20, 38.4)]
    assert train(3, 6) == [(3, 10, 38.4), (6, 16, 64), (9, 22, 64)]  # of step 6 there was no checkpoint
    assert train(0, 4) == [(3, 4, 96), (6, 8, 96)]


def test_a_run_that_never_saved_leaves_nothing_to_one_that_begins_later(tmp_path):
    """As when --resume PATH or --start-epoch was forgotten, and the run stopped and started again with it."""
    record = open_run(tmp_path)
    for step in (3, 6):
        record.log(step, {"loss": 1.0})
    record.close()
    (tmp_path / "views.png").touch()
    record = open_run(tmp_path, first=6, own=False)
    record.log(9, {"loss": 2.0})
    record.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [9]
    assert not (tmp_path / "views.png").exists()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [9]


def test_a_disk_that_fills_between_checkpoints_is_named(tmp_path):
    record = open_run(tmp_path)
    record.metrics.close()
    record.metrics = open("/dev/full", "w", buffering=1)  # noqa: SIM115 (the run closes it)
    for write in (lambda: record.log(3, {}), record.close):  # closing tries to write the line once more
        with pytest.raises(ValueError, match=r"--output .* cannot be written \(No space left on device\): free some"):
            write()
    open_run(tmp_path).close()  # nothing holds the lock


def test_the_picture_of_views_is_that_of_this_run(tmp_path, monkeypatch):
    """Not of one that ended in this folder before its first checkpoint."""
    monkeypatch.setattr(run_module, "save_preview", lambda batch, policy, *_: _[-1].write_text(policy.name))
    loader = make_loader("synthetic", "", batch_size=2, seed=0, device="cpu", synthetic_images=8, synthetic_size=40)
    for policy, first, shown in (("v1", 0, "v1"), ("v2", 0, "v2"), ("none", 3, "v2")):
        record = open_run(tmp_path, first)
        record.preview(loader, make_policy(policy))
        record.close()
        assert (tmp_path / "views.png").read_text() == shown


def test_the_curves_are_drawn_at_every_checkpoint_and_answer_of_the_probe(tmp_path, drawn_curves):
    record, picture = open_run(tmp_path), tmp_path / "curves.png"
    record.save(0, {})
    assert not picture.exists()  # there is nothing to draw
    pictures = set()
    record.log(3, {"loss": 1.0, "contrast": 1.0, "top1": 50.0})
    for draw in (lambda: record.save(3, {}), lambda: record.probe(3, lambda backbone: 50.0, None)):
        draw()
        pictures.add(picture.read_bytes())
    record.log(6, {"loss": 0.5, "lr": 0.1})
    record.save(6, {})
    pictures.add(picture.read_bytes())
    record.close()
    assert len(pictures) == 3 and all(found.startswith(b"\x89PNG") for found in pictures)
