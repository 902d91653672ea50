"""How evaluations compute: matrix products in full float32, compiled loops on all threads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch

from fastssl.machine.threads import run_in_threads


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Matrix products without TF32 and autocast."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def slices(num: int, step: int) -> Iterator[slice]:
    """Cuts 0..num into consecutive slices of `step`, the last one shorter."""
    return (slice(start, min(start + step, num)) for start in range(0, num, step))


def share(loop: Callable[..., None], *by_row: np.ndarray, rest: tuple) -> None:
    """Runs `loop(*by_row, *rest)` on torch's number of threads, each with its part of the rows of `by_row`."""
    num, threads = len(by_row[0]), torch.get_num_threads()
    parts = slices(num, max(16, -(-num // threads)))
    run_in_threads(lambda part: loop(*(array[part] for array in by_row), *rest), parts)
