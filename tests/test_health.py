"""A run that goes bad in silence says so; a process that hangs says where."""

import signal
import subprocess
import sys

import pytest
import torch
from torch import nn

from fastssl import train
from fastssl.config import Config, replace
from fastssl.distributed import Ranks
from fastssl.health import Health, NonFiniteLoss
from fastssl.plan import make_plan

RANKS = Ranks(0, 1, torch.device("cpu"))


def spread(value):
    return {"loss": torch.tensor(1.0), "feature_std": torch.tensor(value)}


def test_collapsed_features_are_named_once():
    health, encoder = Health(RANKS), nn.Linear(2, 2)
    assert health.check(encoder) == []  # before the first step
    health.update(0, spread(0.3))
    assert health.check(encoder) == []
    health.update(1, spread(0.02))
    (line,) = health.check(encoder)
    assert "nearly the same features (feature_std 0.02" in line and "lower --lr" in line
    assert health.check(encoder) == []
    health.update(2, {"loss": torch.tensor(torch.nan)})  # a batch of one has no spread
    with pytest.raises(NonFiniteLoss, match=r"not finite at step 3 \(loss nan\); use a lower --lr"):
        health.check(encoder)


def test_features_may_come_together_while_the_queue_is_random():
    for start_epoch, first in ((0, 0), (2, 18)):
        config = replace(Config(), queue_size=40, batch_size=8, symmetric=True, start_epoch=start_epoch)
        health, encoder = Health(RANKS, make_plan(config, 9).queue_filled()), nn.Linear(2, 2)
        for step, lines in ((0, 0), (2, 0), (3, 1)):
            health.update(first + step, spread(0.02))
            assert len(health.check(encoder)) == lines


def test_a_run_without_anything_that_spreads_says_that_it_collapses(tmp_path, image_folder, capsys):
    line = f"{image_folder} -a resnet18 --image-size 32 -b 8 --epochs 5 --uniform-weight 0 --lr 1 --device cpu -p 1"
    assert train.main(f"{line} --queue-size 8 --knn-every 0 --output {tmp_path / 'run'}".split()) == 0
    assert capsys.readouterr().err.count("all images have nearly the same features") == 1


def test_a_batch_of_one_has_no_spread(tmp_path, image_folder, capsys):
    line = f"{image_folder} -a vit_tiny --image-size 32 -b 1 --steps 1 --device cpu --queue-size 8 --knn-every 0"
    assert train.main(f"{line} --output {tmp_path / 'run'}".split()) == 0
    assert "feature_std" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_what_hangs_says_where_when_it_is_aborted():
    code = (
        "import os, signal; from fastssl.command import run_command\n"
        "def stand_still(argv): os.kill(os.getpid(), signal.SIGABRT)\n"
        "run_command(stand_still, [])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGABRT and "in stand_still" in done.stderr
