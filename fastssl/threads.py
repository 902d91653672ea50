"""Python threads for work that holds no GIL: compiled loops, and PyTorch's calls on one image."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch

Item = TypeVar("Item")


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
