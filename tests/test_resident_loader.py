"""The resident loader: decoded once, in place, checked first, shared out over ranks."""

import itertools
import os
import resource

import numpy as np
import pytest
import torch
from betons import NO_TURBOJPEG, stored_jpeg, write_beton
from photos import render_photo
from PIL import Image

from fastssl import build
from fastssl.config import Config, replace
from fastssl.data_prep.decode import decode_image
from fastssl.data_prep.find import find_images
from fastssl.distributed import Ranks
from fastssl.loaders import memory, stream_loader
from fastssl.loaders.make import make_loader
from fastssl.loaders.order import epoch_order

N = 29


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """29 PNG files in two classes; one is turned by EXIF."""
    root = tmp_path_factory.mktemp("resident")
    for i in range(N):
        (root / f"class{i % 2}").mkdir(exist_ok=True)
        exif = Image.Exif()
        if i == 4:
            exif[0x0112] = 6
        photo = Image.fromarray(render_photo(20 + i, 50 - i, seed=i))
        photo.save(root / f"class{i % 2}" / f"{i:03d}.png", exif=exif)
    return root


@pytest.fixture(params=["folder", "beton"])
def data(request, folder, tmp_path):
    """The same images as a folder and, as JPEGs, in a .beton file."""
    if request.param == "folder":
        return folder
    if NO_TURBOJPEG:
        pytest.skip("needs libturbojpeg")
    photos = [render_photo(20 + i, 50 - i, seed=i) for i in range(N)]
    return write_beton(tmp_path / "some.beton", [stored_jpeg(photo, i % 2) for i, photo in enumerate(photos)])


def open_loader(data, name="resident", **changes):
    return make_loader(name, data, **(dict(batch_size=4, seed=1, device="cpu", workers=2) | changes))


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def contents(batches):
    return [
        (int(i), int(c), batch.image(n).numpy().tobytes())
        for batch in batches
        for n, (i, c) in enumerate(zip(batch.index, batch.label))
    ]


def test_it_gives_what_the_other_loaders_give(data):
    resident, other = open_loader(data), open_loader(data, "auto")
    assert resident.decoded == N and resident.class_names == other.class_names
    assert resident.batches_per_epoch == other.batches_per_epoch == 7
    for first in (0, 5, 9):
        assert contents(take(resident.batches(first), 9)) == contents(take(other.batches(first), 9))
    for limit in (None, 10):
        assert contents(resident.eval_batches(6, limit=limit)) == contents(other.eval_batches(6, limit=limit))
    assert resident.reason.startswith("requested; holds 0.00 GB of ")


def test_batches_are_windows_without_a_copy(data):
    loader = open_loader(data)
    batches = take(loader.batches(), 20) + list(loader.eval_batches(5))
    assert len({batch.pixels.data_ptr() for batch in batches}) == 1
    assert batches[0].pixels.numel() == sum((20 + i) * (50 - i) * 3 for i in range(N))
    assert loader.decoded == N


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("shuffle", ["full", "blocks"])
def test_unsharded_ranks_make_up_the_batch_of_one_process(folder, world_size, shuffle):
    options = {"shuffle": shuffle, "block_size": 3}
    alone = take(open_loader(folder, batch_size=8, **options).batches(2), 5)
    ranks = [
        take(open_loader(folder, batch_size=8 // world_size, rank=r, world_size=world_size, **options).batches(2), 5)
        for r in range(world_size)
    ]
    for batch, parts in zip(alone, zip(*ranks)):
        assert contents([batch]) == contents(parts)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_shards_are_disjoint_and_keep_the_order_of_the_epoch(data, world_size):
    ranks = [
        open_loader(data, batch_size=2, rank=r, world_size=world_size, resident_shard=True) for r in range(world_size)
    ]
    whole = open_loader(data, batch_size=2)
    assert sum(loader.decoded for loader in ranks) == N
    assert {loader.batches_per_epoch for loader in ranks} == {N // (2 * world_size)}
    steps = ranks[0].batches_per_epoch
    truth = {entry[0]: entry for entry in contents(whole.eval_batches(9))}
    for epoch in (0, 1):
        order = epoch_order(N, 1, epoch).tolist()
        seen = []
        for rank, loader in enumerate(ranks):
            entries = contents(take(loader.batches(epoch * steps), steps))
            mine = [i for i in order if N * rank // world_size <= i < N * (rank + 1) // world_size]
            assert [entry[0] for entry in entries] == mine[: steps * 2]
            seen += entries
        assert len({entry[0] for entry in seen}) == len(seen) and all(truth[entry[0]] == entry for entry in seen)
    assert contents(take(ranks[1].batches(3), steps)) == contents(take(ranks[1].batches(), steps + 3))[6:]


@pytest.mark.parametrize("limit", [None, 7])
def test_an_evaluation_of_shards_sees_everything_once(data, limit):
    ranks = [open_loader(data, batch_size=2, rank=r, world_size=3, resident_shard=True) for r in range(3)]
    parts = [contents(loader.eval_batches(4, r, 3, limit)) for r, loader in enumerate(ranks)]
    assert list(itertools.chain(*parts)) == contents(open_loader(data).eval_batches(4, limit=limit))
    alone = contents(ranks[1].eval_batches(8, limit=4))  # as the picture of views asks one rank
    assert len(alone) == 4 and {i for i, _, _ in alone} <= set(range(N // 3, 2 * N // 3 + 1))
    with pytest.raises(ValueError, match="rank 1 of 3 does not hold the images of rank 0 of 3"):
        list(ranks[1].eval_batches(4, 0, 3))


def test_an_evaluation_knows_the_sides_of_its_batches(folder):
    """Not of the data set alone: on a GPU a single large image would make all others expensive."""
    loader = make_loader("resident", folder, batch_size=1, seed=0, device="cpu")
    batches = list(loader.eval_batches(2))
    sides = [int(torch.maximum(batch.height, batch.width).max()) for batch in batches]
    assert [batch.max_side for batch in batches] == sides and len(set(sides)) > 1


def test_one_rank_that_shards_holds_everything(folder):
    assert contents(take(open_loader(folder, resident_shard=True).batches(), 9)) == contents(
        take(open_loader(folder).batches(), 9)
    )


def open_for_training(data, **changes):
    config = replace(Config(), data=str(data), batch_size=4, device="cpu", **changes)
    return build.open_loader(config, Ranks(0, 1, torch.device("cpu")))


def test_training_holds_what_is_small_unless_told_how_to_read(data, monkeypatch):
    held = open_for_training(data)
    kind = "folder" if data.is_dir() else "beton"
    assert held.name == "resident" and ", and it is small: holds 0.00 GB of " in held.reason and kind in held.reason
    assert contents(take(held.batches(), 9)) == contents(take(open_for_training(data, loader=kind).batches(), 9))
    for how in ({"read_ahead": 1}, {"shuffle": "blocks"}, {"beton_cache": "process"}, {"loader": kind}):
        assert open_for_training(data, **how).name == kind
    assert open_loader(data, "auto").name == kind  # evaluations look once
    monkeypatch.setattr(memory, "SMALL", (1 / 8, 1000.0))
    assert open_for_training(data).name == kind


def test_small_is_a_part_of_the_memory_that_is_free_for_each_rank(data, monkeypatch):
    source, needed = open_loader(data, "auto"), sum((20 + i) * (50 - i) * 3 for i in range(N))
    monkeypatch.setattr(memory, "free_bytes", lambda _: needed * 8)
    assert memory.is_small(source, torch.device("cpu"))
    monkeypatch.setattr(memory, "_SAMPLED", 7)  # of 29 whose sizes differ little
    monkeypatch.setattr(memory, "free_bytes", lambda _: needed * 9)
    assert memory.is_small(source, torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert not memory.is_small(source, torch.device("cpu"))
    monkeypatch.setattr(memory, "free_bytes", lambda _: os.stat(data / "proc" / "meminfo"))
    assert not memory.is_small(source, torch.device("cpu"))  # where the system does not tell


def test_too_many_bytes_are_refused_before_anything_is_decoded(data, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda _: 60_000)
    monkeypatch.setattr(stream_loader.StreamLoader, "eval_batches", None)
    message = r"do not fit into memory \(0\.00 GB of 0\.0 GB free on cpu\): use smaller images .*, or --loader auto"
    with pytest.raises(ValueError, match=message):
        open_loader(data)
    with pytest.raises(ValueError, match="use --resident-shard, smaller images"):
        open_loader(data, rank=1, world_size=2)
    needed = sum((20 + i) * (50 - i) * 3 for i in range(N))
    monkeypatch.setattr(memory, "free_bytes", lambda _: needed * 2 - 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="for each of 2 ranks"):
        open_loader(data)


def test_the_prediction_is_what_the_images_take(folder):
    listing = find_images(folder)
    assert memory.folder_pixel_bytes(listing, range(3, 20), 2) == sum(
        decode_image(listing.path(i)).size for i in range(3, 20)
    )
    free = memory.free_bytes(torch.device("cpu"))
    assert 1 << 20 < free < 1 << 50


def test_a_jpeg_whose_header_only_pillow_refuses_is_an_unreadable_image(tmp_path):
    for i in range(6):
        Image.fromarray(render_photo(20, 30, seed=i)).save(tmp_path / f"{i}.jpg")
    whole = (tmp_path / "3.jpg").read_bytes()
    table = whole.index(b"\xff\xdb") + 4  # a quantization table's precision and number
    (tmp_path / "3.jpg").write_bytes(whole[:table] + b"\x14" + whole[table + 1 :])
    resident, folder = open_loader(tmp_path), open_loader(tmp_path, "folder")
    assert contents(take(resident.batches(), 3)) == contents(take(folder.batches(), 3))
    assert resident.bad_images == folder.bad_images and "3.jpg" in folder.bad_images[0]


def test_memory_that_the_process_may_not_have_is_not_free():
    """As `ulimit -v` sets it."""
    limits, room = resource.getrlimit(resource.RLIMIT_AS), 100_000_000
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + room, limits[1]))
    try:
        assert room / 2 < memory.free_bytes(torch.device("cpu")) <= room
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_will_not_be_decoded_needs_no_room(tmp_path):
    """Too many pixels; a pipe, for whose writer nobody waits."""
    Image.new("1", (10_000, 10_000)).save(tmp_path / "0.png")
    Image.new("RGB", (5, 7)).save(tmp_path / "1.png")
    os.mkfifo(tmp_path / "2.png")
    assert memory.folder_pixel_bytes(find_images(tmp_path), range(3), 1) == 5 * 7 * 3


@pytest.mark.parametrize("name", ["folder", "resident"])
def test_unreadable_images_are_replaced_as_the_folder_loader_does(tmp_path, name):
    for i in range(12):
        Image.fromarray(np.full((4, 5 + i, 3), i, np.uint8)).save(tmp_path / f"{i:03d}.png")
    (tmp_path / "003.png").write_bytes(b"")
    (tmp_path / "004.png").write_text("no image")
    (tmp_path / "011.png").write_text("no image")
    loader = open_loader(tmp_path, name, batch_size=12)
    for batch in take(loader.batches(), 2):
        values = {int(i): int(batch.image(n)[0, 0, 0]) for n, i in enumerate(batch.index)}
        assert values == {i: i for i in range(12)} | {3: 5, 4: 5, 11: 0}
    assert [m.split("/")[-1].split(":")[0] for m in sorted(loader.bad_images)] == ["003.png", "004.png", "011.png"]
    assert [i for i, _, _ in contents(loader.eval_batches(3))] == [0, 1, 2, 5, 6, 7, 8, 9, 10]
    with pytest.raises(ValueError, match=r"003\.png|004\.png|011\.png"):
        take(open_loader(tmp_path, name, batch_size=12, on_bad_image="error").batches(), 1)


def test_nothing_readable_is_an_error(tmp_path):
    (tmp_path / "0.png").write_text("no image")
    with pytest.raises(ValueError, match=r"no image can be decoded \(1 tried\)"):
        open_loader(tmp_path, batch_size=1)


def test_a_folder_needs_no_libturbojpeg(folder, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "fastssl.loaders.beton_decode", None)
    assert open_loader(folder).decoded == N


@pytest.mark.gpu
def test_it_holds_the_same_bytes_on_the_gpu(data):
    on_gpu, on_cpu = open_loader(data, device="cuda"), open_loader(data)
    batches = take(on_gpu.batches(3), 12)
    assert all(tensor.is_cuda for batch in batches for tensor in batch[:-1])
    assert contents(batch.to("cpu") for batch in batches) == contents(take(on_cpu.batches(3), 12))
    assert " free on cuda" in on_gpu.reason
