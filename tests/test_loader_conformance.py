"""Every loader holds to the contract, for 1, 2 and 4 ranks: the checks of `fastssl check-loader` on small sets."""

import itertools

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import distributed

from fastssl.commands.check_loader import main
from fastssl.conformance import faults, images, samples
from fastssl.conformance.case import Case
from fastssl.loaders import encoded, file_decode, order, stream_loader
from fastssl.loaders.choose import LOADERS
from fastssl.loaders.make import make_loader
from fastssl.loaders.prefetch import Prefetcher


@pytest.fixture(scope="module", params=LOADERS)
def sets(request, tmp_path_factory):
    """The loader's name and the small sets it can read."""
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", reason="needs DALI")
    root = tmp_path_factory.mktemp(request.param)
    make = {"good": samples.make_good, "odd": samples.make_odd, "bad": samples.make_bad}
    return {name: Case(request.param, make_set(request.param, root)) for name, make_set in make.items()}


@pytest.mark.parametrize("shuffle", ["full", "blocks"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("check", [images.check_shares, images.check_order, images.check_resume])
def test_ranks(sets, check, world_size, shuffle, monkeypatch):
    monkeypatch.setattr(order, "WINDOW_BLOCKS", 4)
    check(sets["good"]._replace(shuffle=shuffle), world_size)


@pytest.mark.parametrize("name", ["good", "odd"])
def test_pixels_are_the_files(sets, name):
    images.check_pixels(sets[name])


@pytest.mark.parametrize(
    "check",
    [
        faults.check_decoded_once,
        faults.check_breaks,
        faults.check_memory,
        faults.check_many_loaders,
        faults.check_dead_producer,
    ],
)
def test_nothing_is_done_twice_or_left_behind(sets, check):
    check(sets["good"])


def test_unreadable_images(sets):
    faults.check_bad(sets["bad"])


def gather_indices(rank, world_size, loader, data):
    """Every rank's indices of an epoch, and its number of steps, as all ranks see them."""
    ranked = make_loader(loader, data, batch_size=3, seed=1, device="cpu", rank=rank, world_size=world_size, workers=1,
                         synthetic_images=26)  # fmt: skip
    steps = ranked.batches_per_epoch
    mine = torch.cat([batch.index for batch in itertools.islice(ranked.batches(), steps)])
    everyone = [torch.empty_like(mine) for _ in range(world_size)]
    distributed.all_gather(everyone, mine)
    ranked.close()
    return steps, torch.cat(everyone).tolist()


def test_processes_share_an_epoch(sets):
    case = sets["good"]
    results = run_ranks(gather_indices, 2, case.loader, case.data)
    assert results[0] == results[1]
    steps, indices = results[0]
    assert steps == 4 and len(indices) == len(set(indices)) == 24


def test_the_checks_can_fail(tmp_path, monkeypatch):
    good, bad = (
        Case("folder", samples.make_good("folder", tmp_path)),
        Case("folder", samples.make_bad("folder", tmp_path)),
    )
    decode, train_shares = encoded.decode_image, stream_loader.train_shares
    with monkeypatch.context() as patch:  # not what is in the file
        patch.setattr(file_decode, "decode_stored_images", None)
        patch.setattr(encoded, "decode_image", lambda data, name: decode(data, name) // 2)
        with pytest.raises(AssertionError, match="grey levels"):
            images.check_pixels(good)
    with monkeypatch.context() as patch:  # every rank takes the first rank's share
        patch.setattr(
            stream_loader, "train_shares", lambda n, b, s, rank, *rest, **more: train_shares(n, b, s, 0, *rest, **more)
        )
        with pytest.raises(AssertionError, match="came twice"):
            images.check_shares(good, 2)
        with pytest.raises(AssertionError, match="rank 1 has another order"):
            images.check_order(good, 2)
    with monkeypatch.context() as patch:  # forgets where it was to begin
        patch.setattr(
            stream_loader, "train_shares", lambda *a, **more: train_shares(*a[:-1], a[-1] and a[-1] + 1, **more)
        )
        with pytest.raises(AssertionError, match="starting at batch 1"):
            images.check_resume(good, 1)
    with monkeypatch.context() as patch:
        patch.setattr(stream_loader.StreamLoader, "bad_images", [])
        with pytest.raises(AssertionError, match="0 of 3 unreadable images were reported"):
            faults.check_bad(bad)
    with monkeypatch.context() as patch:
        patch.setattr(stream_loader.StreamLoader, "decoded", property(lambda self: 2 * self.decoder.images.decoded))
        with pytest.raises(AssertionError, match="decodes for"):
            faults.check_decoded_once(good)


def test_leaks_are_seen(tmp_path, monkeypatch):
    good = Case("folder", samples.make_good("folder", tmp_path))
    end, not_ended = Prefetcher._end, []
    with monkeypatch.context() as patch:
        patch.setattr(Prefetcher, "_end", lambda *arguments: not_ended.append(arguments))
        with pytest.raises(AssertionError, match="left behind"):
            faults.check_breaks(good)
    for arguments in not_ended:
        end(*arguments)
    read, hoard = file_decode.FileDecoder._read, []
    with monkeypatch.context() as patch:
        patch.setattr(
            file_decode.FileDecoder,
            "_read",
            lambda *file: hoard.append(np.ones(200_000, np.uint8)) or read(*file),
        )
        with pytest.raises(AssertionError, match="grew the process by"):
            faults.check_memory(good)


def test_the_command_prints_a_table_and_fails_when_a_check_does(image_folder, monkeypatch, capsys):
    assert main([str(image_folder), "--loader", "folder", "--world-sizes", "1", "2", "--steps", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "folder:" and lines[-1] == "20 of 20 checks passed"
    assert sum(" ok " in line for line in lines) == 20
    monkeypatch.setattr(images, "MEAN_GREY_LEVELS", {"cpu": -1})
    assert main([str(image_folder), "--loader", "folder", "synthetic", "--world-sizes", "1", "--steps", "2"]) == 1
    assert capsys.readouterr().out.count("FAILS") == 4  # the pixels, given and odd, of both loaders


def test_the_command_refuses_what_it_cannot_check(image_folder, tmp_path, capsys, monkeypatch):
    with pytest.raises(ValueError, match="does not exist"):
        main([str(tmp_path / "none"), "--loader", "folder"])
    with pytest.raises(ValueError, match="no loader can read"):  # though one of them reads no files
        main([str(tmp_path / "none")])
    with pytest.raises(ValueError, match="at least 1"):
        main([str(image_folder), "--world-sizes", "0"])
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="--device cuda: torch finds no GPU"):
        patch.setattr(torch.cuda, "is_available", lambda: False)
        main([str(image_folder), "--device", "cuda"])
    with pytest.raises(SystemExit):
        main([str(image_folder), "--device", "gpu"])
    capsys.readouterr()
    with pytest.raises(ValueError, match=r"not a \.beton file"):
        main([str(image_folder), "--loader", "folder", "beton"])
    assert "folder:" not in capsys.readouterr().out  # it was found before the first check
    one = image_folder / "val" / "class0"
    with pytest.raises(ValueError, match=r"has 4 images, and the checks need 8 for these --world-sizes"):
        main([str(one), "--loader", "folder"])
