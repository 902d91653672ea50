"""What a loader does when it is left, runs long, or meets what is broken; and how often it decodes.

Each check raises AssertionError with a sentence, or returns what it saw.
"""

from __future__ import annotations

import gc
import itertools
import os
import threading
import time
import weakref
from unittest import mock

import numpy as np

from fastssl.conformance.case import Case, take
from fastssl.conformance.samples import BAD, NUM_BAD_SET
from fastssl.loaders.prefetch import Prefetcher

READ_AHEAD = 6  # batches a loader may have decoded beyond those it handed out
GROWTH = 24e6  # bytes that 20 epochs may add: the allocator's unrest, not a leak
PATIENCE = 10.0  # seconds within which a dead producer must be an error


def check_decoded_once(case: Case) -> str:
    """No image is decoded twice for its pair of views; reading ahead is bounded."""
    loader = case.open()
    before = loader.decoded
    images = sum(batch.size for batch in loader.eval_batches(case.batch_size))
    once = loader.decoded - before
    assert once in (0, images), f"{once} decodes for {images} images of an evaluation"
    taken = take(loader, 40)
    decodes = loader.decoded - before - once
    assert decodes == 0 or 40 <= decodes / case.batch_size <= 40 + READ_AHEAD, f"{decodes} decodes for 40 batches"
    return f"{decodes} decodes for {sum(batch.size for batch in taken)} pairs" if decodes else "decodes nothing anew"


def check_breaks(case: Case) -> str:
    """Fifty loops left early leave no thread of Python's or of a library's."""
    loader = case.open()
    take(loader, 2)  # what a library starts once, it keeps
    before, tasks = set(threading.enumerate()), count_tasks()
    for _ in range(50):
        for _ in loader.batches(2):
            break
    gc.collect()
    left = set(threading.enumerate()) - before
    assert not left, f"{len(left)} threads are left: {left.pop().name}"
    deadline = time.monotonic() + 5  # the kernel forgets a joined thread a moment later
    while count_tasks() > tasks and time.monotonic() < deadline:
        time.sleep(0.05)
    assert count_tasks() <= tasks, f"{count_tasks() - tasks} threads of a library are left"
    return "none of 50 left a thread"


def check_memory(case: Case) -> str:
    """Twenty epochs do not grow the process."""
    loader = case.open()
    steps = loader.batches_per_epoch
    for _ in itertools.islice(loader.batches(), 5 * steps):
        pass
    before = resident_bytes()
    for _ in itertools.islice(loader.batches(), 20 * steps):
        pass
    grown = resident_bytes() - before
    assert grown < GROWTH, f"20 epochs grew the process by {grown / 1e6:.0f} MB"
    return f"{grown / 1e6:+.1f} MB over 20 epochs"


def check_many_loaders(case: Case) -> str:
    """Ten loaders one after another: each is gone with its last reader, without waiting for the garbage collector."""
    before, alive = resident_bytes(), []
    gc.collect()
    gc.disable()
    try:
        for _ in range(10):
            loader = case.open()
            take(loader, 2)
            alive.append(weakref.ref(loader))
            del loader
    finally:
        gc.enable()
    left = sum(reference() is not None for reference in alive)
    assert not left, f"{left} of 10 loaders that nobody holds are still there, with their buffers"
    return f"ten are gone, {(resident_bytes() - before) / 1e6:+.1f} MB"


def check_bad(case: Case) -> str:
    """An unreadable image is reported and replaced, or stops the run; `case.data` is that of `make_bad`."""
    if case.data is None:
        return "reads no files"
    loader = case.open(batch_size=NUM_BAD_SET)
    (batch,) = take(loader, 1)
    images = {i: batch.image(n).cpu().numpy() for n, i in enumerate(batch.index.tolist())}
    for i, instead in {BAD[0]: BAD[1] + 1, BAD[1]: BAD[1] + 1, BAD[2]: 0}.items():
        assert np.array_equal(images[i], images[instead]), f"unreadable image {i} was not replaced by {instead}"
    _check_names(loader.bad_images)
    loader = case.open(batch_size=NUM_BAD_SET)
    left = [i for batch in loader.eval_batches(5) for i in batch.index.tolist()]
    assert left == [i for i in range(NUM_BAD_SET) if i not in BAD], f"an evaluation sees images {left}"
    _check_names(loader.bad_images)
    try:
        take(case.open(batch_size=NUM_BAD_SET, on_bad_image="error"), 1)
    except ValueError as error:
        assert any(_name_of(i, str(error)) for i in BAD), f"the error does not name the image: {error}"
    else:
        raise AssertionError("on_bad_image='error' did not stop at an unreadable image")
    return f"images {', '.join(map(str, BAD))} were named, replaced, left out, refused"


def check_dead_producer(case: Case) -> str:
    """When the thread that makes batches dies, its reader gets an error within seconds."""
    loader = case.open()
    before = threading.active_count()
    batches = loader.batches()
    next(batches)
    if threading.active_count() == before:
        return "has no thread that could die"
    batches.close()
    start = time.monotonic()
    with mock.patch.object(Prefetcher, "_produce", lambda *_: None):
        try:
            next(loader.batches())
        except RuntimeError:
            pass
        else:
            raise AssertionError("the death of the producer went unnoticed")
    seconds = time.monotonic() - start
    assert seconds < PATIENCE, f"the death of the producer was noticed after {seconds:.0f} s"
    return f"an error after {seconds:.1f} s"


def resident_bytes() -> int:
    """Memory of this process that is in RAM (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def count_tasks() -> int:
    """Threads of this process, whoever started them (Linux)."""
    return len(os.listdir("/proc/self/task"))


def _check_names(messages: list[str]) -> None:
    assert len(messages) == len(BAD), f"{len(messages)} unreadable images were reported, there are {len(BAD)}"
    for i in BAD:
        assert any(_name_of(i, message) for message in messages), f"unreadable image {i} is not named: {messages}"


def _name_of(i: int, message: str) -> bool:
    return f"{i:03d}.jpg" in message or f"[{i}]" in message
