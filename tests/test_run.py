"""The record of a run: what counts as training time, and what is shown."""

import math
import time

import torch

from fastssl import run as run_module
from fastssl.augment.policy import make_policy
from fastssl.config import Config, replace
from fastssl.distributed import Ranks
from fastssl.loaders.make import make_loader
from fastssl.plan import make_plan
from fastssl.run import Run


def open_run(folder):
    config = replace(Config(), image_size=32)
    return Run(folder, config, make_plan(config, 3), 0, Ranks(0, 1, torch.device("cpu")))


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
