"""The classical loop, the peer of the benchmarks: a turn costs what its images cost, and ends when its clock stops."""

import argparse
import time

import pytest
import torch

from fastssl import distributed
from fastssl.bench import classical
from fastssl.bench.classical import Photos, classical_loop
from fastssl.bench.peer_loops import dali_loop, ffcv_loop
from fastssl.bench.step_flags import add_step_flags, make_config, parse_flags

SLOW = 0.15  # seconds for an image: long beside what a busy machine adds
FLAGS = "--image-size 32 --batch-size 4 --queue-size 40 --device cpu".split()


class SlowPhotos(Photos):
    """Photos that take long, as on many cores beside a GPU, where the step is short."""

    def __getitem__(self, index):
        time.sleep(SLOW if self.wanted else 0)
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
    monkeypatch.setattr(classical, "Photos", SlowPhotos)
    monkeypatch.setattr(classical, "make_classical_step", lambda *_: lambda view_q, view_k: view_q.mean())
    workers = 3
    loop = classical_loop(str(folder), tiny_config(), distributed.start("cpu"), workers, amp=False)
    loop(1)  # starts the workers
    turns = []
    for _ in range(2):
        start = time.perf_counter()
        seconds = loop(1)
        turns.append((seconds, time.perf_counter() - start))
    images = 4 * SLOW / workers  # seconds that a batch takes all workers
    for seconds, turn in turns:
        assert 0.7 * images < seconds < turn
        # two waves, of which one warms up; the two that the workers have begun take no time
        assert turn < 3.5 * 4 * SLOW


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
