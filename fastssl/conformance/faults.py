"""Checks of loaders that are left early, run long, or meet unreadable images or a dead thread; and of decode counts.

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
from fastssl.plural import counted

READ_AHEAD = 6  # batches that a loader may have decoded beyond those it gave out
GROWTH = 24e6  # bytes by which 20 epochs may grow the process: allocator noise, not a leak
PATIENCE = 10.0  # seconds within which the death of the producer must raise an error


def check_decoded_once(case: Case) -> str:
    """An image is decoded once for its pair of views, and reading ahead is bounded."""
    loader = case.open()
    before = loader.decoded
    images = sum(batch.size for batch in loader.eval_batches(case.batch_size))
    once = loader.decoded - before
    assert once in (0, images), f"{once} decodes for {images} images of an evaluation"
    taken = take(loader, 40)
    decodes = loader.decoded - before - once
    assert decodes == 0 or 40 <= decodes / case.batch_size <= 40 + READ_AHEAD, f"{decodes} decodes for 40 batches"
    return f"{decodes} decodes for {sum(batch.size for batch in taken)} pairs" if decodes else "decodes nothing again"


def check_breaks(case: Case) -> str:
    """Fifty loops left early leave no threads behind, neither Python's nor a library's."""
    loader = case.open()
    take(loader, 2)  # so that threads which a library starts only once do not count
    before, tasks = set(threading.enumerate()), count_tasks()
    for _ in range(50):
        for _ in loader.batches(2):
            break
    gc.collect()
    left = set(threading.enumerate()) - before
    assert not left, f"{counted(len(left), 'thread')} left behind, such as {left.pop().name}"
    deadline = time.monotonic() + 5  # the kernel lists a joined thread for a moment longer
    while count_tasks() > tasks and time.monotonic() < deadline:
        time.sleep(0.05)
    assert count_tasks() <= tasks, f"{counted(count_tasks() - tasks, 'thread')} of a library left behind"
    return "no threads left behind"


def check_memory(case: Case) -> str:
    """Twenty epochs do not make the process grow."""
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
    """Each of ten loaders is freed as soon as nobody refers to it, without waiting for the garbage collector."""
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
    assert not left, f"{left} of 10 unused loaders were not freed, and hold their buffers"
    return f"all freed, {(resident_bytes() - before) / 1e6:+.1f} MB"


def check_bad(case: Case) -> str:
    """Unreadable images are reported and replaced, or raise an error; `case.data` comes from `make_bad`."""
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
    assert left == [i for i in range(NUM_BAD_SET) if i not in BAD], f"an evaluation saw images {left}"
    _check_names(loader.bad_images)
    try:
        take(case.open(batch_size=NUM_BAD_SET, on_bad_image="error"), 1)
    except ValueError as error:
        assert any(_name_of(i, str(error)) for i in BAD), f"the error does not name the image: {error}"
    else:
        raise AssertionError("on_bad_image='error' did not raise an error for an unreadable image")
    return f"images {', '.join(map(str, BAD))} were named, replaced, left out and refused"


def check_dead_producer(case: Case) -> str:
    """When the thread that makes the batches dies, the reader gets an error within seconds."""
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
    """Resident memory of this process (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def count_tasks() -> int:
    """Threads of this process, whoever started them (Linux)."""
    return len(os.listdir("/proc/self/task"))


def _check_names(messages: list[str]) -> None:
    assert len(messages) == len(BAD), f"{len(messages)} of {len(BAD)} unreadable images were reported"
    for i in BAD:
        assert any(_name_of(i, message) for message in messages), f"unreadable image {i} is not named: {messages}"


def _name_of(i: int, message: str) -> bool:
    return f"{i:03d}.jpg" in message or f"[{i}]" in message
