"""Parts of a batch on several threads, each of which computes whole images alone.

An operation on one image is too short to be shared among threads; between operations a thread that has the image for
itself keeps it in its core's cache. PyTorch's operations let other threads run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch


def run_parts(function: Callable[..., None], parts: Sequence[tuple], device: torch.device) -> None:
    """Calls function(*part) for every part; on the CPU on `torch.get_num_threads()` threads. Errors are raised."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if threads == 1 or len(parts) == 1:
        for part in parts:
            function(*part)
        return
    inference = torch.is_inference_mode_enabled()  # a property of the thread

    def run(part: tuple) -> None:
        with torch.inference_mode(inference):
            function(*part)

    list(_pool(threads, os.getpid()).map(run, parts))


@lru_cache(maxsize=1)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """The threads of this process; a forked child has none of its parent's."""
    pool = ThreadPoolExecutor(threads, "views", initializer=torch.set_num_threads, initargs=(1,))
    list(pool.map(lambda _: None, range(4 * threads)))
    torch.set_num_threads(threads)  # a thread's own number is also what later threads begin with
    return pool
