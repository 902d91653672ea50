"""The classical loop, the peer of the benchmarks: a turn costs what its images cost, and ends when its clock stops."""

import argparse
import itertools
import time
from functools import partial

import pytest
import torch
from ranks import FORKS

from fastssl import distributed
from fastssl.bench import classical
from fastssl.bench.classical import Photos, classical_loop
from fastssl.bench.peer_loops import dali_loop, ffcv_loop
from fastssl.bench.step_flags import add_step_flags, make_config, parse_flags

FLAGS = "--image-size 32 --batch-size 4 --queue-size 40 --device cpu".split()


WORKERS, NEEDED = 3, 8  # images of each worker in a turn: a wave of batches of 4 to warm up, and one that is timed


class CountedPhotos(Photos):
    """Photos whose workers make what a turn needs, and begin with the rest only when it is no longer wanted."""

    made = torch.zeros(WORKERS, dtype=torch.int64).share_memory_()

    def __init__(self, *args):
        super().__init__(*args)
        self.made = CountedPhotos.made  # the class's own would not be shared with the workers

    def __getitem__(self, index):
        worker, deadline = torch.utils.data.get_worker_info().id, time.monotonic() + 120
        while self.wanted and self.made[worker] == NEEDED:
            assert time.monotonic() < deadline, "it waits for images beyond those of the turn"
            time.sleep(0.001)
        self.made[worker] += int(self.wanted)
        return super().__getitem__(index)


def tiny_config(*flags):
    parser = argparse.ArgumentParser()
    add_step_flags(parser)
    return make_config(parse_flags(parser, [*FLAGS, *flags]), "resnet18")


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores: they only sleep
def test_a_turn_of_the_classical_loop_pays_for_its_images_and_leaves_no_work_behind(
    tmp_path, monkeypatch, make_image_folder
):
    folder = make_image_folder(tmp_path / "images", {"train": 8})
    monkeypatch.setattr(classical, "Photos", CountedPhotos)
    # its workers are forked after their imports, which take long; those of an image that cannot be decoded are not
    forked = partial(torch.utils.data.DataLoader, multiprocessing_context=FORKS)
    monkeypatch.setattr(classical, "DataLoader", lambda *args, multiprocessing_context, **more: forked(*args, **more))
    monkeypatch.setattr(classical, "make_classical_step", lambda *_: lambda view_q, view_k: view_q.mean())

    def time_steps(batches, step, steps, warm_up):
        assert sum(1 for _ in itertools.islice(batches, warm_up + steps)) == steps + warm_up == 2 * WORKERS
        return 6.0

    monkeypatch.setattr(classical, "time_steps", time_steps)
    loop = classical_loop(str(folder), tiny_config(), distributed.start("cpu"), WORKERS, amp=False)
    for _ in range(2):
        CountedPhotos.made.zero_()
        assert loop(1) == 6.0 / WORKERS  # a step of the wave that was timed
        assert CountedPhotos.made.tolist() == [NEEDED] * WORKERS


@pytest.mark.parametrize("loop", ["classical", "dali", "ffcv"])
def test_a_loop_without_a_whole_batch_says_so_instead_of_waiting(tmp_path, loop, make_image_folder):
    folder, ranks, config = (
        make_image_folder(tmp_path / "images", {"train": 1}),
        distributed.start("cpu"),
        tiny_config(),
    )
    with pytest.raises(ValueError, match="3 images do not fill a batch of 4: use --batch-size 3 or less"):
        if loop == "classical":
            classical_loop(str(folder), config, ranks, 0, amp=False)
        elif loop == "dali":
            pytest.importorskip("nvidia.dali")
            dali_loop(str(folder), config, ranks, 1)
        else:
            pytest.importorskip("ffcv")
            from fastssl.data_prep.prepare import Store
            from fastssl.data_prep.sources import Selection
            from fastssl.data_prep.work_pool import Work
            from fastssl.data_prep.write_beton import write_beton

            write_beton(str(folder), str(tmp_path / "x.beton"), Store(originals=True), Selection(), Work(1))
            ffcv_loop(str(tmp_path / "x.beton"), config, ranks, 1)


def test_amp_is_not_timed_on_a_cpu_that_imitates_it(tmp_path, monkeypatch, make_image_folder):
    folder, ranks = make_image_folder(tmp_path / "images", {"train": 4}), distributed.start("cpu")
    monkeypatch.setattr(classical, "WARM_UP", 1)  # a step may take a second where AMP is imitated
    monkeypatch.setattr("fastssl.machine.precision.bf16_unit", lambda: "AMX")
    assert classical_loop(str(folder), tiny_config(), ranks, 0, amp=True)(1) > 0
    monkeypatch.setattr("fastssl.machine.precision.bf16_unit", lambda: "")
    assert classical_loop(str(folder), tiny_config(), ranks, 0, amp=False)(1) > 0
    with pytest.raises(ValueError, match="AMP would only slow it down: no 16-bit arithmetic on this cpu"):
        classical_loop(str(folder), tiny_config(), ranks, 0, amp=True)


def test_an_image_that_cannot_be_decoded_is_named(tmp_path, make_image_folder):
    folder = make_image_folder(tmp_path / "images", {"train": 4}) / "train"
    photos = Photos(str(folder), 32)
    path = photos.samples[1][0]
    open(path, "wb").close()
    with pytest.raises(ValueError, match=f"{path} cannot be decoded .*: remove it"):
        photos[1]
    for workers in (0, 1):
        with pytest.raises(ValueError, match=f"^{path} cannot be decoded [^\n]*: remove it$"):
            classical_loop(str(folder), tiny_config("--batch-size", "12"), distributed.start("cpu"), workers, False)(1)
    (view_q, view_k), _ = photos[0]
    assert view_q.shape == view_k.shape == (3, 32, 32) and view_q.std() > 0
    photos.wanted.fill_(False)
    assert not photos[1][0][0].any() and photos[1][0][0].dtype == torch.float32
