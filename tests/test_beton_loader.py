"""The beton loader beyond the contract all loaders share: its pixels, damaged images, FFCV's failures, its threads."""

import io
import itertools
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from betons import FFCV_PHOTOS, NO_TURBOJPEG, encode_jpeg, stored_jpeg, write_beton
from photos import render_photo
from PIL import Image
from ranks import run_ranks

from fastssl.data_prep.beton_format import JPEG, RAW
from fastssl.data_prep.describe import describe
from fastssl.data_prep.verify import verify
from fastssl.loaders.make import make_loader

pytestmark = pytest.mark.skipif(NO_TURBOJPEG, reason="needs libturbojpeg")

N = 23
PHOTOS = [render_photo(24 + 5 * (i % 7), 90 - 8 * (i % 5), seed=i, grey=i % 6 == 5) for i in range(N)]
FILES = [
    encode_jpeg(photo, "L" if i % 6 == 5 else "RGB", subsampling=i % 3 if i % 6 != 5 else -1, progressive=i % 4 == 3)
    for i, photo in enumerate(PHOTOS)
]


def stored(i, **changes):
    values = dict(data=FILES[i], height=PHOTOS[i].shape[0], width=PHOTOS[i].shape[1], mode=JPEG, label=i % 3)
    return tuple((values | changes).values())


def by_pillow(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_beton(tmp_path_factory.mktemp("beton") / "good.beton", [stored(i) for i in range(N)])


def open_loader(data, name="beton", **changes):
    return make_loader(name, data, **(dict(batch_size=4, seed=1, device="cpu", workers=3, read_ahead=2) | changes))


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def images_of(batches):
    """{index: (label, pixels)} of the batches."""
    return {
        int(i): (int(c), batch.image(n).numpy().copy())
        for batch in batches
        for n, (i, c) in enumerate(zip(batch.index, batch.label))
    }


@pytest.mark.parametrize("cache", ["page", "process"])
def test_pixels_are_those_pillow_decodes(good, cache):
    """Baseline, progressive, grey, 4:4:4, 4:2:2, 4:2:0: accurate IDCT on both sides, so at most rounding differs."""
    seen = images_of(open_loader(good, beton_cache=cache).eval_batches(5))
    assert list(seen) == list(range(N))
    for i, (label, pixels) in seen.items():
        assert label == i % 3
        difference = np.abs(pixels.astype(int) - by_pillow(FILES[i]))
        assert difference.max() <= 1 and difference.mean() < 0.01


def test_images_beyond_two_and_four_gib_are_their_own(tmp_path):
    """Of a file of 6 GiB that is nearly all holes: the third image begins beyond 2^32, the second beyond 2^31."""
    large = write_beton(tmp_path / "large.beton", [stored(i) for i in range(3)], gap=1 << 31)
    loaders = [open_loader(large, batch_size=3, beton_cache=cache) for cache in ("page", "process")]
    for loader in [*loaders, open_loader(large, "resident", batch_size=3)]:
        seen = images_of(loader.eval_batches(3))
        assert list(seen) == [0, 1, 2]
        for i, (_, pixels) in seen.items():
            assert np.abs(pixels.astype(int) - by_pillow(FILES[i])).max() <= 1
    assert loaders[0].decoder.beton.pointer[1] > 1 << 31 and loaders[0].decoder.beton.pointer[2] > 1 << 32
    assert "3 images decoded" in verify(large, decode=True, workers=1) and "3 samples" in describe(large)


def test_raw_images_are_copied(tmp_path):
    images = [stored(i, data=PHOTOS[i].tobytes(), mode=RAW) if i % 2 else stored(i) for i in range(N)]
    seen = images_of(
        open_loader(write_beton(tmp_path / "mixed.beton", images)).batches().__iter__().__next__() for _ in "1"
    )
    for i, (_, pixels) in seen.items():
        np.testing.assert_array_equal(pixels, PHOTOS[i] if i % 2 else by_pillow(FILES[i]))


@pytest.mark.parametrize("mode", ["jpg", "raw", "proportion", "smart", "many"])
def test_files_of_ffcv_s_own_writer(by_ffcv, mode):
    loader = open_loader(by_ffcv / f"{mode}.beton")
    seen = images_of(take(loader.batches(), loader.batches_per_epoch))
    assert len(seen) == 12 and loader.bad_images == []
    for i, (label, pixels) in seen.items():
        assert label == i % 3
        if loader.decoder.beton.mode[i] == RAW:
            np.testing.assert_array_equal(pixels, FFCV_PHOTOS[i])
        else:
            np.testing.assert_allclose(pixels, by_pillow(bytes(loader.decoder.beton.bytes(i))), atol=1)


def test_auto_chooses_it_by_the_name_of_the_file(good):
    loader = open_loader(good, "auto")
    assert loader.name == "beton" and "good.beton is a .beton file" in loader.reason


def test_a_missing_library_is_one_sentence_with_the_mend(good, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastssl.loaders.beton_decode", None)
    with pytest.raises(ValueError, match=r"'beton' needs a library that is missing .*'fastssl doctor' for the"):
        open_loader(good, "auto")
    with pytest.raises(ValueError, match=r"'resident' needs a library that is missing .*'fastssl doctor' for the"):
        open_loader(good, "resident")


def cut(data, share=0.6):
    return data[: int(len(data) * share)]


def scramble(data):
    """A marker that does not belong there, in the middle of the coded pixels."""
    start = len(data) * 3 // 4
    return data[:start] + b"\xff\xd1" + data[start + 2 :]


BAD = {3: 4, N - 1: 0}  # and what takes their places
DAMAGE = {
    "cut": (lambda data: cut(data), "Premature end"),
    "header": (lambda data: b"\0\0\0\0" + data[4:], "not an image in a known format"),
    "scrambled": (scramble, "Corrupt JPEG data: "),
    "empty": (lambda data: b"", "empty"),
    "noise": (lambda data: np.random.default_rng(1).bytes(500), "not an image in a known format"),
    "another size": (lambda data: encode_jpeg(render_photo(64, 64, seed=0)), "64 x 64 but the index says"),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("cache", ["page", "process"])
def test_a_damaged_jpeg_is_named_and_replaced_never_shown(tmp_path, kind, cache):
    """FFCV ignores the decoder's return code and shows what lay in the buffer before."""
    change, reason = DAMAGE[kind]
    images = [stored(i, data=change(FILES[i])) if i in BAD else stored(i) for i in range(N)]
    loader = open_loader(write_beton(tmp_path / "bad.beton", images), batch_size=N, beton_cache=cache)
    for batch in take(loader.batches(), 3):
        for i, (label, pixels) in images_of([batch]).items():
            used = BAD.get(i, i)
            assert label == used % 3
            np.testing.assert_array_equal(pixels, by_pillow(FILES[used]))
    assert sorted(m.split(": ")[0] for m in loader.bad_images) == sorted(f"{tmp_path}/bad.beton[{i}]" for i in BAD)
    assert all(reason in message for message in loader.bad_images)
    left = images_of(loader.eval_batches(5))
    assert list(left) == [i for i in range(N) if i not in BAD]


@pytest.mark.parametrize("kind", ["cut", "scrambled", "another size"])
def test_a_damaged_jpeg_can_stop_the_run(tmp_path, kind):
    images = [stored(i, data=DAMAGE[kind][0](FILES[i])) if i == 3 else stored(i) for i in range(N)]
    loader = open_loader(write_beton(tmp_path / "bad.beton", images), batch_size=N, on_bad_image="error")
    for iterate in (loader.batches, lambda: loader.eval_batches(3)):
        with pytest.raises(ValueError, match=r"cannot decode \S+bad\.beton\[3\]: .*--on-bad-image skip"):
            take(iterate(), 9)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastssl")]


def test_cmyk_and_other_formats_are_decoded_as_the_folder_loader_does(tmp_path):
    cmyk = encode_jpeg(PHOTOS[3], "CMYK")
    png = io.BytesIO()
    Image.fromarray(PHOTOS[4]).save(png, "PNG")
    images = [stored(i, data={3: cmyk, 4: png.getvalue()}.get(i, FILES[i])) for i in range(N)]
    loader = open_loader(write_beton(tmp_path / "odd.beton", images), batch_size=N)
    seen = images_of(take(loader.batches(), 1))
    np.testing.assert_array_equal(seen[3][1], by_pillow(cmyk))
    np.testing.assert_array_equal(seen[4][1], PHOTOS[4])
    assert loader.bad_images == []


def test_padding_before_the_end_of_an_image_is_no_damage(tmp_path):
    images = [stored(i, data=FILES[i][:-2] + b"\0\0\0" + FILES[i][-2:]) if i == 2 else stored(i) for i in range(N)]
    loader = open_loader(write_beton(tmp_path / "padded.beton", images), batch_size=N)
    np.testing.assert_array_equal(images_of(take(loader.batches(), 1))[2][1], by_pillow(FILES[2]))
    assert loader.bad_images == []


def test_nothing_readable_is_an_error_not_a_loop(tmp_path):
    path = write_beton(tmp_path / "bad.beton", [stored(i, data=b"no image") for i in range(9)])
    for _ in range(2):
        loader = open_loader(path, batch_size=3)
        with pytest.raises(ValueError, match=r"9 images in a row cannot be decoded"):
            take(loader.batches(), 3)
        assert list(loader.eval_batches(4)) == []


def test_each_image_is_decoded_exactly_once(good, monkeypatch):
    from fastssl.loaders import beton_decode

    decoded = []
    original = beton_decode.decode_stored_images

    def count(source, *rest):
        decoded.extend(source.tolist())
        return original(source, *rest)

    monkeypatch.setattr(beton_decode, "decode_stored_images", count)
    loader = open_loader(good)
    list(loader.eval_batches(4))
    stored = loader.decoder.beton.data.ctypes.data + loader.decoder.beton.pointer
    assert sorted(decoded) == sorted(stored.tolist()) and loader.decoded == N


def wait_until_idle(loader):
    """Until it has read ahead as far as it may."""
    decoded = -1
    while loader.decoded != decoded:
        decoded = loader.decoded
        time.sleep(0.5)


def test_a_file_that_is_cut_while_it_is_read_is_an_error_not_a_signal(tmp_path):
    for cache in ("page", "process"):
        path = write_beton(tmp_path / f"{cache}.beton", [stored(i) for i in range(N)])
        loader = open_loader(path, beton_cache=cache)
        batches = loader.batches()
        next(batches)
        wait_until_idle(loader)  # what is being decoded at that moment would still touch pages that are gone
        os.truncate(path, 1 << 21)
        with pytest.raises(ValueError, match="was truncated while it was read"):
            take(batches, 60)


def test_labels_of_a_held_out_file_follow_the_training_classes(tmp_path):
    path = write_beton(tmp_path / "val.beton", [stored(i, label=i % 2) for i in range(6)], ["dog", "cat"])
    loader = open_loader(path, batch_size=1, class_names=["ant", "cat", "dog"])
    assert next(loader.eval_batches(6)).label.tolist() == [2, 1] * 3


def test_a_batch_stays_as_it_is_while_anything_holds_its_bytes(good):
    """Buffers are used again, but only once their batch, its tensors and arrays of them are gone."""
    loader = open_loader(good, seed=3)
    expected = [images_of([batch]) for batch in take(loader.batches(), 60)]
    held = []
    for n, batch in enumerate(loader.batches()):
        if n == 60:
            break
        held.append((batch.index.tolist(), [batch.image(k).numpy() for k in range(4)] if n % 3 else batch))
        held = held[-7:]
        del batch
        for index, images in held:
            step = n - len(held) + 1 + [i for i, _ in held].index(index)
            images = images if isinstance(images, list) else [images.image(k).numpy() for k in range(4)]
            assert all(np.array_equal(image, expected[step][i][1]) for i, image in zip(index, images))


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc to measure memory")
def test_memory_does_not_grow_over_epochs(good):
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    loader = open_loader(good)
    take(loader.batches(), 100)
    before = resident()
    take(loader.batches(), 5 * 40)
    for _ in range(50):
        next(loader.batches())
    assert resident() - before < 20e6
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastssl")]


def test_importing_and_reading_leaves_torch_s_threads_and_ffcv_alone(good):
    """ffcv sets torch to one thread when it is imported; two of its loaders at once can end the process."""
    code = (
        "import sys, torch; torch.set_num_threads(3)\n"
        "from fastssl.loaders.make import make_loader\n"
        "loaders = [make_loader('beton', sys.argv[1], batch_size=4, seed=0, device='cpu') for _ in range(2)]\n"
        "for one, two in zip(loaders[0].batches(), loaders[1].batches(20)):\n"
        "    if one.index[0] == 0: break\n"
        "assert torch.get_num_threads() == 3 and 'ffcv' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(good)], check=True, timeout=120)


def test_the_first_batch_comes_soon(good):
    """In CPU time, loosely: a busy machine is slow. Compiled code must not need numba, which alone takes 0.4 s."""
    code = (
        "import sys, time, torch\n"
        "start = time.process_time()\n"
        "from fastssl.loaders.make import make_loader\n"
        "next(make_loader('beton', sys.argv[1], batch_size=4, seed=0, device='cpu').batches())\n"
        "print(time.process_time() - start)\n"
        "assert not {'numba', 'ffcv'} & set(sys.modules)\n"
    )
    seconds = (
        float(subprocess.run([sys.executable, "-c", code, str(good)], stdout=subprocess.PIPE, check=True).stdout)
        for _ in range(3)
    )
    assert any(taken < 0.5 for taken in seconds)


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux's /proc to measure memory")
def test_a_large_batch_takes_little_beyond_its_buffers(tmp_path):
    """The reader holds a batch, one waits for it, one waits to wait, three are being decoded: six of 256 images."""
    photos = [render_photo(256, 384, seed=i) for i in range(8)]
    path = write_beton(tmp_path / "large.beton", [stored_jpeg(photo) for photo in photos] * 64)
    code = (
        "import itertools, sys, torch\n"
        "from fastssl.bench.loader_process import own_bytes\n"
        "before, most = own_bytes(), 0\n"
        "from fastssl.loaders.make import make_loader\n"
        "loader = make_loader('beton', sys.argv[1], batch_size=256, seed=0, device='cpu', workers=4)\n"
        "for batch in itertools.islice(loader.batches(), 12):\n"
        "    most = max(most, own_bytes() - before)\n"
        "print(most - 6 * len(batch.pixels))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, check=True, timeout=120)
    assert int(done.stdout) < 0.1e9


def rank_images(rank, world_size, path):
    loader = open_loader(path, rank=rank, world_size=world_size, batch_size=8 // world_size)
    batches = take(loader.batches(1), 4)
    return [(i, image[1].tobytes()) for batch in batches for i, image in images_of([batch]).items()]


def test_processes_make_up_the_batches_of_one(good):
    ranks = run_ranks(rank_images, 2, str(good))
    alone = rank_images(0, 1, str(good))
    assert sorted(itertools.chain(*ranks)) == sorted(alone)


def test_a_forked_process_reads_on_its_own(good):
    loader = open_loader(good)
    expected = images_of(take(loader.batches(), 2))
    child = os.fork()
    if child == 0:
        seen = images_of(take(loader.batches(), 2))
        os._exit(0 if all(np.array_equal(seen[i][1], expected[i][1]) for i in expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_failure_in_a_thread_reaches_the_reader_at_once(good, monkeypatch):
    """FFCV's loader thread dies and `next` waits for ever."""
    from fastssl.loaders import beton_decode

    def fail(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(beton_decode, "decode_stored_images", fail)
    begun = time.monotonic()
    with pytest.raises(MemoryError, match="no room"):
        take(open_loader(good).batches(), 3)
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 24}, "23 images but a step takes 24"),
        ({"beton_cache": "ram"}, "--beton-cache must be 'page' or 'process', got 'ram'"),
        ({"name": "betn"}, "did you mean 'beton'"),
        ({"data": "/no/such.beton"}, r"/no/such\.beton does not exist"),
        ({"data": "/tmp"}, "is a folder, not a"),
        ({"name": "folder"}, "is a file, not a folder"),
    ],
)
def test_mistakes_are_one_clear_sentence(good, changes, message):
    with pytest.raises(ValueError, match=message) as info:
        open_loader(changes.pop("data", good), **changes)
    assert "\n" not in str(info.value)


@pytest.mark.gpu
def test_batches_arrive_whole_on_the_gpu_through_pinned_memory(tmp_path):
    photos = [render_photo(300, 400, seed=i) for i in range(40)]
    path = write_beton(tmp_path / "large.beton", [stored_jpeg(photo) for photo in photos])
    expected = images_of(open_loader(path).eval_batches(8))
    loader = open_loader(path, device="cuda", batch_size=8)
    source = loader.decoder.batches(iter([torch.arange(8)]), replace=True)
    assert next(source).pixels.is_pinned()
    source.close()
    for n, batch in enumerate(take(loader.batches(), 100)):
        assert all(tensor.is_cuda for tensor in batch[:-1])
        if n % 10 == 0:  # the others' buffers are used again while this one's copy may still run
            torch.cuda._sleep(20_000_000)
        for i, (_, pixels) in images_of([batch.to("cpu")]).items():
            np.testing.assert_array_equal(pixels, expected[i][1])
