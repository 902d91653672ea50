"""Python threads for work that releases the GIL: compiled loops, PyTorch operations, image decoders."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier, get_native_id
from typing import TypeVar

import torch

Item = TypeVar("Item")
YIELDING = 10  # the niceness of threads that only prepare later batches


def run_in_threads(work: Callable[[Item], None], items: Iterable[Item]) -> None:
    """Calls `work` for every item, on as many threads as torch uses; raises the first item's exception, if any."""
    items, threads = list(items), torch.get_num_threads()
    if threads == 1 or len(items) < 2:
        for item in items:
            work(item)
        return
    for _ in make_threads(threads, os.getpid()).map(work, items):
        pass


@cache
def make_threads(num: int, process: int) -> ThreadPoolExecutor:
    """A pool of `num` threads that is kept, because starting threads can take longer than the work itself.

    process: this process's id, so that a forked process makes a pool of its own. In each thread torch uses a single
    thread: OpenMP slows the whole process down once it has more threads than there are cores.
    """
    started = Barrier(num + 1)

    def start() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # makes this thread adopt the number now; otherwise it would at its first operation
        started.wait()

    pool = ThreadPoolExecutor(num, thread_name_prefix="compute", initializer=start)
    for _ in range(num):
        pool.submit(int)  # starts one thread each, because all of them wait at the barrier
    started.wait()
    torch.set_num_threads(num)  # restores the number for all other threads
    return pool


def reader_threads(num: int, name: str, device: torch.device) -> ThreadPoolExecutor:
    """A pool of threads that read and decode images.

    When training on a GPU they have a lower priority than the thread that launches its kernels: batches are decoded
    ahead, so they can wait. When training on a CPU the step waits for its images, so they have the same priority.
    """
    yields = device.type == "cuda" and sys.platform == "linux"  # only Linux has a niceness for each thread
    return ThreadPoolExecutor(num, thread_name_prefix=name, initializer=_yield_cores if yields else None)


def _yield_cores() -> None:
    os.setpriority(os.PRIO_PROCESS, get_native_id(), max(YIELDING, os.getpriority(os.PRIO_PROCESS, 0)))
