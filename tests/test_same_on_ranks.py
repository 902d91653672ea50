"""Ranks that were started differently, or see other images, are told so before the first step."""

from argparse import Namespace

import pytest
import torch
from ranks import run_ranks

from fastssl import distributed, train
from fastssl.config import Config, replace
from fastssl.distributed import Ranks
from fastssl.eval.images import open_splits


def refusals(rank, world_size, folder, runs):
    """What each run says on this rank; a run's options are those of all ranks and those of rank 1."""
    distributed.stop = lambda: None  # the ranks' process group serves all runs
    common = dict(arch="resnet18", image_size=32, batch_size=4, queue_size=8, dim=8, device="cpu", channels_last="on")
    said = []
    for shared, other in runs:
        config = replace(Config(), output=str(folder), steps=1, **common, **shared)
        with pytest.raises(ValueError) as refusal:
            train.pretrain(replace(config, **other) if rank else config)
        said.append(str(refusal.value))
    return said


def refusal_of_evaluation(rank, world_size, folders):
    with pytest.raises(ValueError) as refusal:
        open_splits(Namespace(data=folders[rank], workers=1), Ranks(rank, world_size, torch.device("cpu")))
    return str(refusal.value)


def test_ranks_that_evaluate_other_images_are_refused(make_image_folder, tmp_path):
    """k-NN would mix their banks, and a linear evaluation wait for days: an epoch has other steps on each."""
    folders = [make_image_folder(tmp_path / str(n), {"train": n, "val": 2}) for n in (4, 3)]
    said = "rank 0 sees 12 train images and rank 1 9: give all ranks the same data"
    assert run_ranks(refusal_of_evaluation, 2, folders) == [said, said]


def test_ranks_that_were_started_differently_or_see_other_images_are_refused(make_image_folder, tmp_path):
    data, more, named = (
        str(make_image_folder(tmp_path / name, {"train": n, "val": 2})) for name, n in (("a", 20), ("b", 21), ("c", 20))
    )
    (tmp_path / "c" / "train" / "class1").rename(tmp_path / "c" / "train" / "another")
    without_val = str(make_image_folder(tmp_path / "d", {"train": 20}))
    runs = {
        "--lr is 0.03 on rank 0 but 0.3 on rank 1: give": ({"data": data}, {"lr": 0.3}),
        "rank 0 sees 60 training images and rank 1 63: give": ({"data": data}, {"data": more}),
        "rank 1 sees training images of other classes than rank 0: give": ({"data": data}, {"data": named}),
        "rank 0 sees 6 held-out images and rank 1 0: give": ({"data": data}, {"data": without_val}),
    }
    said = run_ranks(refusals, 2, tmp_path / "run", list(runs.values()))
    for sentence, ours, theirs in zip(runs, *said):
        assert ours == theirs and ours.startswith(sentence)
