"""Python threads for work that holds no GIL: compiled loops, PyTorch's calls on one image, decoders of images."""

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
YIELDING = 10  # niceness of threads that prepare what the training needs later


def run_in_threads(work: Callable[[Item], None], items: Iterable[Item]) -> None:
    """`work` on every item, on as many threads as torch computes with; raises what the first to fail raises."""
    items, threads = list(items), torch.get_num_threads()
    if threads == 1 or len(items) < 2:
        for item in items:
            work(item)
        return
    for _ in make_threads(threads, os.getpid()).map(work, items):
        pass


@cache
def make_threads(num: int, process: int) -> ThreadPoolExecutor:
    """Threads that stay, since a loop takes less time than they take to start; none outlive a fork.

    Within each, torch computes on one thread: OpenMP slows down for the whole process once it has more threads in all
    than there are cores.
    """
    started = Barrier(num + 1)

    def start() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # a thread takes the common number over when it first needs one: now that it is 1
        started.wait()

    pool = ThreadPoolExecutor(num, thread_name_prefix="compute", initializer=start)
    for _ in range(num):
        pool.submit(int)  # a thread for each, as none is free before all have started
    started.wait()
    torch.set_num_threads(num)  # the common number again
    return pool


def reader_threads(num: int, name: str, device: torch.device) -> ThreadPoolExecutor:
    """Threads that read and decode. Beside a GPU they leave the cores to the thread that launches its kernels.

    That thread finds a core whenever it wants one, and batches are made ahead in the time it leaves. On a CPU the
    training itself waits for its images: they are as urgent as it is.
    """
    yields = device.type == "cuda" and sys.platform == "linux"  # where each thread has a niceness of its own
    return ThreadPoolExecutor(num, thread_name_prefix=name, initializer=_yield_cores if yields else None)


def _yield_cores() -> None:
    os.setpriority(os.PRIO_PROCESS, get_native_id(), max(YIELDING, os.getpriority(os.PRIO_PROCESS, 0)))
