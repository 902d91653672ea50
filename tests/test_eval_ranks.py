"""Transfer, cached linear, t-SNE and `all` on two processes: what one process finds."""

import time
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_eval_views import make_view_set

from fastssl import distributed
from fastssl.distributed import Ranks
from fastssl.eval import all as everything
from fastssl.eval import linear, transfer, tsne
from fastssl.eval.features import gather_features
from fastssl.eval.memory import DiskRows, Memory
from fastssl.eval.options import finish_options
from fastssl.eval.session import Session, run_session

CPU = torch.device("cpu")
SHARED = ["-a", "resnet18", "--image-size", "32", "-b", "5", "-j", "1"]
ELSEWHERE = ("files", "figures", "folder", "search")  # where results went, and how they were searched for


def evaluate_on_rank(rank, world_size, images, views, folder):
    """name -> what the command returns."""
    commands = {
        "transfer": (transfer, transfer.make_transfer_parser(), [images, "--dataset", "caltech101", "--epochs", "2",
                     "--schedule", "1", "--lr", "1", "--output", f"{folder}/transfer"]),
        "transfer, cached": (transfer, transfer.make_transfer_parser(), [images, "--dataset", "caltech101",
                             "--protocol", "cached", "--epochs", "3", "--lrs", "0.1,1,3"]),
        "linear, cached": (linear, linear.make_linear_parser(), [images, "--protocol", "cached", "--epochs", "3",
                           "--lrs", "0.1,1", "--wds", "0,1e-3"]),
        "tsne": (tsne, tsne.make_tsne_parser(), [views, "--perplexity", "5", "--pic-name", f"{folder}/t"]),
        "all": (everything, everything.make_all_parser(), [images, "--views", views, "-k", "5", "-s", "6", "--epochs",
                "3", "--lrs", "0.1,1", "--perplexity", "5", "--figure", f"{folder}/all"]),
    }  # fmt: skip
    found = {}
    for name, (module, parser, words) in commands.items():
        options = finish_options(parser.parse_args([*map(str, words), *SHARED]))
        options.pic_name = getattr(options, "figure", None) or getattr(options, "pic_name", None)  # as `all` does
        found[name] = module.evaluate(Session(options, Ranks(rank, world_size, CPU)))
    return found


def assert_same(found, truth, where="", rel=1e-5):
    """Numbers to float32 noise, everything else exactly."""
    if isinstance(truth, dict):
        names = set(truth) - set(ELSEWHERE)
        assert names <= set(found), where
        for name in names:
            assert_same(found[name], truth[name], f"{where} {name}", rel)
    elif isinstance(truth, list):
        assert len(found) == len(truth), where
        for i, (a, b) in enumerate(zip(found, truth)):
            assert_same(a, b, f"{where} {i}", rel)
    elif isinstance(truth, float):
        assert found == pytest.approx(truth, rel=rel, abs=rel), where
    else:
        assert found == truth, where


def test_two_processes_find_what_one_does(image_folder, tmp_path):
    views, one = make_view_set(tmp_path / "views"), tmp_path / "one"
    truth = evaluate_on_rank(0, 1, image_folder, views, one)
    first, second = run_ranks(evaluate_on_rank, 2, image_folder, views, tmp_path, timeout=240)
    assert_same(first, truth)
    assert second["tsne"] == {}  # the first process draws
    assert_same(second, {**truth, "tsne": {}})
    for name in ("t", "all"):
        for part in tsne.PARTS:
            ours, theirs = (np.load(folder / f"{name}.{part}.npy") for folder in (tmp_path, one))
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def gather_on_rank(rank, world_size, on_disk):
    if on_disk:
        Memory.make_rows = lambda self, n, c: DiskRows(n, c)
    options = finish_options(linear.make_linear_parser().parse_args(["x"]))
    session = Session(options, Ranks(rank, world_size, CPU))
    part = slice(0, 3) if rank == 0 else slice(3, 10)
    everything = torch.arange(50.0).view(10, 5)
    rows = gather_features(session, everything[part])
    return type(rows).__name__, rows[:].float()


@pytest.mark.parametrize("on_disk", [False, True])
def test_features_of_all_ranks_wherever_there_is_room(on_disk):
    for kind, rows in run_ranks(gather_on_rank, 2, on_disk):
        assert kind == ("DiskRows" if on_disk else "Tensor")
        assert torch.equal(rows, torch.arange(50.0).view(10, 5))


def wait_for_rank_0(rank, world_size, folder):
    """An evaluation in which rank 0 works longer than a collective of training may take."""
    distributed.TIMEOUT = timedelta(seconds=4)
    dist.destroy_process_group()

    def evaluate(session):
        time.sleep(8 * (rank == 0))
        return {}

    options = finish_options(linear.make_linear_parser().parse_args(["x", "--device", "cpu"]))
    code = run_session("tsne", options, evaluate)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    return code


def test_ranks_wait_for_the_one_that_draws(tmp_path):
    assert run_ranks(wait_for_rank_0, 2, tmp_path) == [0, 0]
