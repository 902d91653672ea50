"""What is special about DALI: what it is given, what it is spared, and what happens when it gives up."""

import io
import itertools
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.conformance import samples
from fastssl.data_prep.decode import decode_image
from fastssl.loaders import dali_batches, dali_read
from fastssl.loaders.dali_decode import DaliFailed, JpegDecoder
from fastssl.loaders.dali_read import is_plain_jpeg
from fastssl.loaders.make import make_loader


def take(loader, count):
    return list(itertools.islice(loader.batches(), count))


def contents(batch):
    return [
        (int(i), int(c), batch.image(n).cpu().numpy().tobytes())
        for n, (i, c) in enumerate(zip(batch.index, batch.label))
    ]


def open_loader(name, data, **changes):
    if name == "dali":
        pytest.importorskip("nvidia.dali", reason="needs DALI")
    options = {"batch_size": 6, "seed": 0, "device": "cpu", "workers": 2, "read_ahead": 2}
    return make_loader(name, data, **(options | changes))


@pytest.fixture
def mixed_folder(tmp_path):
    """Good JPEGs and one of each odd kind under one roof."""
    samples.make_good("dali", tmp_path, 20)
    samples.make_odd("dali", tmp_path)
    (tmp_path / "odd").rename(tmp_path / "good" / "odd")
    return tmp_path / "good"


def test_batches_are_those_of_the_folder_loader(mixed_folder):
    ours, folder = (take(open_loader(name, mixed_folder), 24) for name in ("dali", "folder"))
    assert [contents(batch) for batch in ours] == [contents(batch) for batch in folder]


def jpeg(**options):
    encoded = io.BytesIO()
    Image.fromarray(np.arange(48 * 40 * 3, dtype=np.uint8).reshape(48, 40, 3)).save(encoded, "JPEG", **options)
    return encoded.getvalue()


def test_only_plain_jpegs_are_given_to_dali(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 3
    assert is_plain_jpeg(jpeg()) and is_plain_jpeg(jpeg(progressive=True)) and is_plain_jpeg(jpeg() + b"more")
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    for data in (
        b"", b"no image", jpeg()[:-2], jpeg()[:300], jpeg(exif=turned), jpeg(keep_rgb=True), jpeg(xmp=xmp),
        jpeg().replace(b"\xff\xda", b"\xff\x01", 1),
    ):  # fmt: skip
        assert not is_plain_jpeg(data)


@pytest.fixture
def trusting(monkeypatch):
    """DALI is given whatever begins like a JPEG."""
    monkeypatch.setattr(dali_read, "is_plain_jpeg", lambda data: data[:2] == b"\xff\xd8")


@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_what_dali_gives_up_on_is_found_and_treated_as_elsewhere(tmp_path, trusting, batch_size, capfd):
    data = samples.make_bad("dali", tmp_path)
    # by one thread: if another met the bad image before it first, it would be known as bad before it is given to DALI
    options = {"batch_size": batch_size, "seed": 2, "workers": 1}
    ours, folder = (open_loader(name, data, **options) for name in ("dali", "folder"))
    for mine, theirs in zip(take(ours, 24), take(folder, 24)):
        assert contents(mine) == contents(theirs)
    assert sorted(ours.bad_images) == sorted(folder.bad_images) and len(ours.bad_images) == 3
    assert ours.decoder.reader.refused == {samples.BAD[1]}  # the one that begins like a JPEG
    assert [contents(b) for b in ours.eval_batches(5)] == [contents(b) for b in folder.eval_batches(5)]
    with pytest.raises(ValueError, match=r"cannot decode \S+/0(03|04|11)\.jpg: .*--on-bad-image skip"):
        take(open_loader("dali", data, batch_size=12, on_bad_image="error"), 1)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastssl")]


def test_a_good_image_that_dali_refuses_is_decoded_elsewhere(tmp_path, monkeypatch):
    data = samples.make_good("dali", tmp_path, 12)
    refused = (data / "class1" / "005.jpg").read_bytes()
    receive = JpegDecoder.receive

    def refuse(self, allocate):
        if any(held.tobytes() == refused for batch in self._held for held in batch):
            raise DaliFailed("one of these")
        return receive(self, allocate)

    monkeypatch.setattr(JpegDecoder, "receive", refuse)
    ours = open_loader("dali", data)
    assert [contents(b) for b in take(ours, 8)] == [contents(b) for b in take(open_loader("folder", data), 8)]
    assert ours.bad_images == [] and ours.decoder.reader.refused == {5}


def test_a_failure_that_is_no_images_fault_is_raised(tmp_path, monkeypatch):
    data = samples.make_good("dali", tmp_path, 12)
    loader = open_loader("dali", data)
    pack = dali_batches.DaliDecoder._pack

    def fail(self, decoder, items):
        if len(items) > 1:
            raise DaliFailed("the device is on fire")
        return pack(self, decoder, items)

    monkeypatch.setattr(dali_batches.DaliDecoder, "_pack", fail)
    with pytest.raises(DaliFailed, match="on fire"):
        take(loader, 3)


def test_an_error_in_a_reading_thread_reaches_the_reader(tmp_path, monkeypatch):
    data = samples.make_good("dali", tmp_path, 12)
    loader = open_loader("dali", data)

    def fail(data):
        raise MemoryError("no room")

    monkeypatch.setattr(dali_read, "is_plain_jpeg", fail)
    with pytest.raises(MemoryError, match="no room"):
        take(loader, 1)


def test_without_dali_the_mend_is_named(tmp_path, monkeypatch):
    data = samples.make_good("dali", tmp_path, 12)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    mend = r"cannot import nvidia\.dali .*install nvidia-dali-cuda120 .*--loader folder for .*--loader beton for"
    with pytest.raises(ValueError, match=mend):
        make_loader("dali", data, batch_size=6, seed=0, device="cpu")


def test_memory_is_used_again_only_when_nobody_looks(tmp_path):
    data = samples.make_good("dali", tmp_path, 24)
    loader = open_loader("dali", data)
    batches = loader.batches()
    held = next(batches)
    image, before = held.image(0), contents(held)
    places = {held.pixels.data_ptr()}
    for _ in range(20):
        batch = next(batches)
        assert batch.pixels.data_ptr() != held.pixels.data_ptr()
        places.add(batch.pixels.data_ptr())
        del batch
    assert contents(held) == before and len(places) < 10
    del held
    for _ in range(10):
        assert next(batches).pixels.data_ptr() != image.data_ptr()  # a view of one image keeps the batch's memory
    assert image.numpy().tobytes() == before[0][2]
    batches.close()


@pytest.mark.gpu
def test_images_are_decoded_on_the_gpu(mixed_folder):
    on_cpu, on_gpu = (take(open_loader("dali", mixed_folder, device=device), 24) for device in ("cpu", "cuda"))
    assert all(tensor.device.type == "cuda" for batch in on_gpu for tensor in batch[:-1])
    for expected, found in zip(on_cpu, on_gpu):
        assert found.index.tolist() == expected.index.tolist()
        for n in range(found.size):
            difference = found.image(n).cpu().int() - expected.image(n).int()
            assert difference.abs().double().mean() < 1


@pytest.mark.gpu
def test_a_batch_on_the_gpu_is_not_overwritten(mixed_folder):
    loader = open_loader("dali", mixed_folder, device="cuda")
    held = take(loader, 24)
    torch.cuda.synchronize()
    assert [contents(batch) for batch in held] == [contents(batch) for batch in take(loader, 24)]


def test_truth_is_what_pillow_says(mixed_folder):
    loader = open_loader("dali", mixed_folder)
    for batch in loader.eval_batches(7):
        for n, i in enumerate(batch.index.tolist()):
            truth = decode_image(loader.decoder.reader.encoded.read(i))
            np.testing.assert_array_equal(batch.image(n).numpy(), truth)
