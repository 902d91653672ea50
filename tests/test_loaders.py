"""The loaders' contract, on real files: same images, same order, nothing left behind, nothing hidden."""

import gc
import itertools
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch
from betons import NO_TURBOJPEG, write_beton
from PIL import Image

from fastssl.data_prep.beton_format import RAW
from fastssl.data_prep.decode import decode_image
from fastssl.loaders import bad_images, encoded, prefetch
from fastssl.loaders.choose import choose_loader
from fastssl.loaders.make import make_loader
from fastssl.loaders.synthetic_loader import render_images
from fastssl.machine.threads import YIELDING, reader_threads
from fastssl.random_key import permutation

NUM_IMAGES = 37


def file_pixels(i):
    """What file i holds, (H, W, 3) uint8: sizes differ, the first pixel tells the file."""
    pixels = np.random.default_rng(i).integers(0, 256, (5 + i % 4, 6 + i % 3, 3), dtype=np.uint8)
    pixels[0, 0] = (i, 255 - i, 7)
    return pixels


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory):
    """37 PNG files in 3 classes; file order is number order."""
    root = tmp_path_factory.mktemp("images")
    for i in range(NUM_IMAGES):
        folder = root / "train" / f"class{i * 3 // NUM_IMAGES}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(file_pixels(i)).save(folder / f"{i:03d}.png")
    return root


@pytest.fixture
def bad_folder(tmp_path):
    """A flat folder of 12 files; 3, 4 and the last one cannot be read."""
    for i in range(12):
        Image.fromarray(file_pixels(i)).save(tmp_path / f"{i:03d}.png")
    (tmp_path / "003.png").write_bytes(b"")
    (tmp_path / "004.png").write_bytes((tmp_path / "005.png").read_bytes()[:60])
    (tmp_path / "011.png").write_text("no image")
    return tmp_path


@pytest.fixture(scope="module")
def good_beton(tmp_path_factory):
    """The same images and classes in a .beton file, as pixels."""
    stored = []
    for i in range(NUM_IMAGES):
        pixels = file_pixels(i)
        stored.append((pixels.tobytes(), *pixels.shape[:2], RAW, i * 3 // NUM_IMAGES))
    return write_beton(tmp_path_factory.mktemp("betons") / "good.beton", stored, ["class0", "class1", "class2"])


AHEAD = {0: "in turn", 2: "ahead"}
LOADERS = [(name, ahead) for name in ("folder", "beton", "dali") for ahead in AHEAD]


@pytest.fixture(params=[*LOADERS, ("resident", 0), ("synthetic", 0)], ids=lambda one: f"{one[0]}, {AHEAD[one[1]]}")
def make(request, good_folder):
    """make(**changes) -> loader, for each kind over the same number of images, with and without a thread."""
    name, read_ahead = request.param
    if name == "beton" and NO_TURBOJPEG:
        pytest.skip("needs libturbojpeg")
    if name == "dali":
        pytest.importorskip("nvidia.dali", reason="needs DALI")
    data = request.getfixturevalue("good_beton") if name == "beton" else good_folder
    loaders = []

    def build(**changes):
        options = dict(batch_size=4, seed=1, device="cpu", synthetic_images=NUM_IMAGES, synthetic_size=6, workers=3)
        loaders.append(make_loader(name, data, read_ahead=read_ahead, **(options | changes)))
        return loaders[-1]

    yield build
    for loader in loaders:
        loader.close()


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def contents(batch):
    """(index, label, pixels as bytes) of each image, independent of where the bytes lie."""
    return [
        (int(i), int(c), batch.image(n).numpy().tobytes()) for n, (i, c) in enumerate(zip(batch.index, batch.label))
    ]


def all_contents(batches):
    return [contents(batch) for batch in batches]


def test_batches_obey_the_contract(make):
    loader = make()
    assert loader.num_images == NUM_IMAGES and loader.batches_per_epoch == 9 and loader.bad_images == []
    for batch in take(loader.batches(), 3):
        assert batch.size == 4
        dtypes = [torch.uint8, torch.int64, torch.int32, torch.int32, torch.int64, torch.int64]
        assert [t.dtype for t in batch[:-1]] == dtypes
        assert all(t.dim() == 1 and t.device.type == "cpu" for t in batch[:-1])
        assert batch.max_side >= max(batch.height.max(), batch.width.max())


def test_order_is_the_one_of_the_key(make):
    indices = torch.cat([batch.index for batch in take(make(seed=9).batches(), 18)])
    expected = [permutation(9, epoch, NUM_IMAGES, stream=16)[:36] for epoch in (0, 1)]
    assert torch.equal(indices, torch.cat(expected))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_make_up_the_batch_of_one_process(make, world_size):
    alone = all_contents(take(make(batch_size=8).batches(), 10))
    ranks = [make(batch_size=8 // world_size, rank=r, world_size=world_size) for r in range(world_size)]
    assert {loader.batches_per_epoch for loader in ranks} == {4}
    parts = [all_contents(take(loader.batches(), 10)) for loader in ranks]
    assert [list(itertools.chain(*step)) for step in zip(*parts)] == alone


def test_workers_do_not_matter(make):
    runs = [all_contents(take(make(workers=workers).batches(), 12)) for workers in (1, 2, 7, None)]
    assert all(run == runs[0] for run in runs)
    assert all_contents(take(make(seed=2).batches(), 12)) != runs[0]


def test_resume_anywhere_equals_uninterrupted(make):
    whole = all_contents(take(make().batches(), 24))
    loader = make()
    for first in (0, 1, 8, 9, 10, 17, 20):  # mid-epoch, at and across the epoch boundary
        assert all_contents(take(loader.batches(first), 4)) == whole[first : first + 4]


def test_two_iterators_at_once_do_not_disturb_each_other(make):
    loader = make()
    one, two, evaluation = loader.batches(), loader.batches(3), loader.eval_batches(5)
    seen = [(contents(next(one)), contents(next(two)), contents(next(evaluation))) for _ in range(5)]
    assert [a for a, _, _ in seen[3:]] == [b for _, b, _ in seen[:2]]
    assert [index for _, _, e in seen for index, _, _ in e] == list(range(25))


def test_batches_are_not_overwritten_by_later_ones(make):
    loader = make()
    kept = take(loader.batches(), 20)
    assert all_contents(kept) == all_contents([batch for batch in take(loader.batches(), 20)])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_evaluation_sees_everything_once_in_file_order(make, world_size):
    loader = make()
    ranks = [list(loader.eval_batches(5, rank, world_size)) for rank in range(world_size)]
    batches = list(itertools.chain(*ranks))
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(NUM_IMAGES))
    assert all(0 < batch.size <= 5 for batch in batches)
    by_index = {
        index: (label, pixels) for batch in take(loader.batches(), 18) for index, label, pixels in contents(batch)
    }
    assert all(by_index.get(i, (c, p)) == (c, p) for batch in batches for i, c, p in contents(batch))


def test_evaluation_limit(make):
    chosen = torch.cat([batch.index for batch in make().eval_batches(4, limit=10)])
    assert len(chosen) == 10 and chosen[0] == 0 and (chosen[1:] - chosen[:-1]).unique().tolist() == [3, 4]


def test_fifty_early_breaks_leave_no_thread(make):
    loader = make()
    before = set(threading.enumerate())
    for _ in range(50):
        for _ in loader.batches(5):
            break
    evaluation = loader.eval_batches(3)
    next(evaluation)
    del evaluation
    gc.collect()
    assert set(threading.enumerate()) <= before


def test_close_ends_iterators_that_are_still_held(make):
    loader = make()
    before = threading.active_count()
    held = loader.batches()
    next(held)
    loader.close()
    assert threading.active_count() <= before
    loader.close()
    assert len(take(loader.batches(), 2)) == 2  # a closed loader can begin anew


def test_folder_pixels_and_labels_are_the_files(good_folder):
    loader = make_loader("folder", good_folder, batch_size=6, seed=0, device="cpu")
    assert loader.class_names == ["class0", "class1", "class2"]
    for batch in take(loader.batches(), 12):
        for n, (index, label) in enumerate(zip(batch.index.tolist(), batch.label.tolist())):
            np.testing.assert_array_equal(batch.image(n).numpy(), file_pixels(index))
            assert label == index * 3 // NUM_IMAGES


def test_each_image_is_decoded_once_per_epoch(good_folder, monkeypatch):
    decoded = []
    original = decode_image
    monkeypatch.setattr(encoded, "decode_image", lambda data, name: decoded.append(name) or original(data))
    loader = make_loader("folder", good_folder, batch_size=4, seed=0, device="cpu", workers=4, read_ahead=2)
    batches = loader.batches()
    take(batches, 9)
    batches.close()
    first = set(permutation(0, 0, NUM_IMAGES, stream=16)[:36].tolist())
    counts = {i: sum(path.endswith(f"{i:03d}.png") for path in decoded) for i in first}
    later = set(permutation(0, 1, NUM_IMAGES, stream=16)[:20].tolist())  # read ahead into the next epoch
    assert all(count == 1 or (i in later and count == 2) for i, count in counts.items())


@pytest.mark.parametrize(("read_ahead", "batches_decoded"), [(None, 1), (0, 1), (2, 6)])
def test_reading_ahead_is_bounded(good_folder, monkeypatch, read_ahead, batches_decoded):
    decoded = []
    original = decode_image
    monkeypatch.setattr(encoded, "decode_image", lambda data, name: decoded.append(name) or original(data))
    loader = make_loader("folder", good_folder, batch_size=2, seed=0, device="cpu", workers=4, read_ahead=read_ahead)
    batches = loader.batches()
    next(batches)
    time.sleep(0.3)
    assert 2 <= len(decoded) <= 2 * batches_decoded
    assert (len(decoded) > 2) == bool(read_ahead)  # by default a CPU is left to the step
    batches.close()


def test_bad_images_are_named_and_replaced_by_the_next_readable(bad_folder):
    loader = make_loader("folder", bad_folder, batch_size=12, seed=0, device="cpu", workers=4)
    for batch in take(loader.batches(), 3):
        first_pixels = {int(i): int(batch.image(n)[0, 0, 0]) for n, i in enumerate(batch.index)}
        assert first_pixels == {i: i for i in range(12)} | {3: 5, 4: 5, 11: 0}
    bad = sorted(loader.bad_images)
    assert [message.split(":")[0] for message in bad] == [str(bad_folder / f"{i:03d}.png") for i in (3, 4, 11)]
    assert bad[0].endswith("the file is empty") and "not an image" in bad[2]
    assert loader.class_names == [] and set(batch.label.tolist()) == {-1}


def test_a_replacement_brings_its_label(tmp_path):
    for name in ("a/0.png", "b/0.png", "b/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(file_pixels(0)).save(tmp_path / name)
    (tmp_path / "a" / "0.png").write_bytes(b"junk")
    batch = next(make_loader("folder", tmp_path, batch_size=3, seed=0, device="cpu").batches())
    assert sorted(zip(batch.index.tolist(), batch.label.tolist())) == [(0, 1), (1, 1), (2, 1)]


def test_bad_images_are_left_out_of_an_evaluation(bad_folder):
    loader = make_loader("folder", bad_folder, batch_size=2, seed=0, device="cpu")
    batches = list(loader.eval_batches(2))
    assert torch.cat([batch.index for batch in batches]).tolist() == [0, 1, 2, 5, 6, 7, 8, 9, 10]
    assert len(loader.bad_images) == 3


def test_the_list_of_bad_images_grows_at_its_end(bad_folder):
    loader = make_loader("folder", bad_folder, batch_size=1, seed=0, device="cpu", workers=4)
    batches, last = loader.batches(), []
    for _ in range(24):
        next(batches)
        now = loader.bad_images
        assert now[: len(last)] == last
        last = now
    assert len(last) == 3


def test_bad_image_can_stop_the_run(bad_folder):
    loader = make_loader("folder", bad_folder, batch_size=12, seed=0, device="cpu", on_bad_image="error")
    with pytest.raises(ValueError, match=r"cannot decode \S+/0(03|04|11)\.png: .*--on-bad-image skip"):
        next(loader.batches())
    with pytest.raises(ValueError, match=r"cannot decode \S+/003\.png: the file is empty"):
        list(loader.eval_batches(1))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastssl")]


def test_nothing_readable_is_an_error_not_a_loop(tmp_path, monkeypatch):
    for i in range(8):
        (tmp_path / f"{i}.jpg").write_bytes(b"junk")
    loader = make_loader("folder", tmp_path, batch_size=4, seed=0, device="cpu")
    with pytest.raises(ValueError, match=r"8 images in a row cannot be decoded, .*\.jpg: not an image"):
        next(loader.batches())
    Image.fromarray(file_pixels(0)).save(tmp_path / "9.png")
    monkeypatch.setattr(bad_images, "MAX_BAD_RUN", 4)
    with pytest.raises(ValueError, match="4 images in a row"):
        take(make_loader("folder", tmp_path, batch_size=4, seed=0, device="cpu").batches(), 2)


def test_a_failure_in_a_worker_reaches_the_reader_at_once(good_folder, monkeypatch):
    def fail(data, name):
        if name.endswith("020.png"):
            raise MemoryError("no room for 020")
        return decode_image(data)

    monkeypatch.setattr(encoded, "decode_image", fail)
    loader = make_loader("folder", good_folder, batch_size=4, seed=0, device="cpu")
    start = time.monotonic()
    with pytest.raises(MemoryError, match="no room for 020"):
        take(loader.batches(), 9)
    assert time.monotonic() - start < 5
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastssl")]


def test_a_loader_on_the_cpu_leaves_the_gpu_alone(good_folder, monkeypatch):
    """CUDA takes memory on the GPU, and once it has started a forked process can no longer ask for a stream."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("CUDA starts"))
    for name in ("folder", "resident"):
        loader = make_loader(name, good_folder, batch_size=4, seed=0, device="cpu", workers=2, read_ahead=2)
        assert take(loader.batches(), 1)[0].size == 4
        loader.close()


@pytest.mark.parametrize("read_ahead", AHEAD)
def test_a_reader_of_a_closed_loader_gets_an_error_not_silence(good_folder, read_ahead):
    loader = make_loader("folder", good_folder, batch_size=4, seed=0, device="cpu", read_ahead=read_ahead)
    batches = loader.batches()
    next(batches)
    loader.close()
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="the loader was closed"):
        take(batches, 5)
    assert time.monotonic() - start < 5


def test_batches_that_a_forked_process_inherits_are_refused_there(good_folder):
    batches = make_loader("folder", good_folder, batch_size=4, seed=0, device="cpu").batches()
    next(batches)
    child = os.fork()
    if child == 0:
        signal.alarm(10)  # ends a process that waits for threads which only its parent has
        try:
            next(batches)
        except RuntimeError as error:
            os._exit("begun before this process was forked" not in str(error))
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert next(batches).size == 4


def test_a_dead_producer_is_an_error_not_a_wait(good_folder, monkeypatch):
    monkeypatch.setattr(prefetch.Prefetcher, "_produce", lambda *_: None)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="its thread died"):
        next(make_loader("folder", good_folder, batch_size=4, seed=0, device="cpu", read_ahead=2).batches())
    assert time.monotonic() - start < 5


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc to measure memory")
def test_memory_does_not_grow_over_epochs(good_folder):
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    loader = make_loader("folder", good_folder, batch_size=6, seed=0, device="cpu", workers=2)
    take(loader.batches(), 60)
    before = resident()
    take(loader.batches(), 6 * 40)
    assert resident() - before < 20e6


def test_evaluation_labels_follow_the_training_classes(good_folder, tmp_path):
    (tmp_path / "class2").mkdir()
    Image.fromarray(file_pixels(0)).save(tmp_path / "class2" / "0.png")
    training = make_loader("folder", good_folder, batch_size=1, seed=0, device="cpu")
    loader = make_loader("folder", tmp_path, batch_size=1, seed=0, device="cpu", class_names=training.class_names)
    assert next(loader.eval_batches(1)).label.tolist() == [2]


def test_synthetic_images_are_a_function_of_seed_and_index():
    images = render_images(20, 32, seed=4)
    assert images.shape == (20, 32, 32, 3) and images.dtype == torch.uint8
    assert torch.equal(render_images(7, 32, seed=4), images[:7])
    assert not torch.equal(render_images(7, 32, seed=5), images[:7])
    assert len({image.numpy().tobytes() for image in images}) == 20
    assert images.min() < 30 and images.max() > 225
    steps = (images[:, 1:].int() - images[:, :-1].int()).abs()
    assert steps.double().mean() > 0 and steps.max() <= 60  # smooth: a photograph's neighbours, not noise
    for size in (1, 2, 7, 8, 9):
        assert render_images(2, size, seed=4).shape == (2, size, size, 3)


def test_synthetic_batches_are_windows_without_a_copy():
    options = dict(batch_size=5, seed=0, device="cpu", synthetic_images=11, synthetic_size=4)
    loader = make_loader("synthetic", None, **options)
    one, two = take(loader.batches(), 2)
    assert one.pixels.data_ptr() == two.pixels.data_ptr() and one.pixels.numel() == 11 * 4 * 4 * 3
    rendered = render_images(11, 4, seed=0)
    for n, i in enumerate(one.index):
        assert torch.equal(one.image(n), rendered[i])
    assert torch.equal(one.label, one.index % 10) and len(loader.class_names) == 10


def test_auto_says_what_it_chose_and_why(good_folder):
    loader = make_loader("auto", good_folder, batch_size=4, seed=0, device="cpu")
    assert loader.name == "folder" and "is a folder" in loader.reason
    assert choose_loader("synthetic", None)[0] == "synthetic"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"name": "foldr"},
            r"unknown loader 'foldr': did you mean 'folder'\? choose from auto, folder, beton, dali",
        ),
        ({"name": "zzz"}, r"unknown loader 'zzz': choose from"),
        ({"data": None}, "no data set was given"),
        ({"data": "/no/such/folder"}, "/no/such/folder does not exist"),
        ({"name": "auto", "data": __file__}, r"test_loaders\.py is a file"),
        ({"name": "folder", "data": __file__}, r"test_loaders\.py is a file"),
        ({"batch_size": 38}, "37 images but a step takes 38"),
        ({"batch_size": 10, "world_size": 4}, r"37 images but a step takes 40 \(batch size 10 on each of 4 ranks\)"),
        ({"name": "synthetic", "synthetic_images": 3}, "3 images but a step takes 4"),
        ({"name": "synthetic", "synthetic_size": 0}, "at least 1 pixel wide"),
        ({"on_bad_image": "ignore"}, "must be 'skip' or 'error', got 'ignore'"),
        ({"workers": -1}, "workers must be 0 or more"),
        ({"rank": 3, "world_size": 2}, "rank must lie between 0 and world_size - 1, got 3 of 2"),
    ],
)
def test_mistakes_are_one_clear_sentence(good_folder, changes, message):
    options = dict(name="auto", data=good_folder, batch_size=4, seed=0, device="cpu") | changes
    with pytest.raises(ValueError, match=message) as info:
        make_loader(options.pop("name"), options.pop("data"), **options)
    assert "\n" not in str(info.value)


def test_workers_share_the_machine_between_its_ranks(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert prefetch.count_workers(None) == 16 and prefetch.count_workers(3) == 3
    assert prefetch.count_workers(0) == 1  # as of a DataLoader
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert prefetch.count_workers(None) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert prefetch.count_workers(None) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="a thread has no niceness of its own")
def test_readers_leave_the_cores_to_the_thread_that_feeds_a_gpu():
    own = os.getpriority(os.PRIO_PROCESS, 0)

    def niceness(device):
        with reader_threads(2, "read", torch.device(device)) as threads:
            return {threads.submit(os.getpriority, os.PRIO_PROCESS, 0).result() for _ in range(8)}

    assert niceness("cuda") == {max(own, YIELDING)} and niceness("cpu") == {own}
    assert os.getpriority(os.PRIO_PROCESS, 0) == own


@pytest.mark.gpu
def test_folder_batches_arrive_whole_on_the_gpu(good_folder):
    on_cpu = make_loader("folder", good_folder, batch_size=6, seed=0, device="cpu")
    on_gpu = make_loader("folder", good_folder, batch_size=6, seed=0, device="cuda")
    expected = all_contents(take(on_cpu.batches(), 60))
    batches = take(on_gpu.batches(), 60)
    assert all(t.device.type == "cuda" for batch in batches for t in batch[:-1])
    torch.cuda.synchronize()
    assert all_contents([batch.to("cpu") for batch in batches]) == expected


@pytest.mark.gpu
def test_synthetic_images_are_the_same_bytes_on_the_gpu():
    assert torch.equal(render_images(9, 50, seed=3, device="cuda").cpu(), render_images(9, 50, seed=3))
