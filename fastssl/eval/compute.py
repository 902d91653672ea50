"""How evaluations compute: products in full float32, compiled loops on all threads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch

from fastssl.threads import run_in_threads


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """No TF32 and no autocast."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def slices(num: int, step: int) -> Iterator[slice]:
    """0 to num, at most `step` at once."""
    return (slice(start, min(start + step, num)) for start in range(0, num, step))


def share(loop: Callable[..., None], *by_row: np.ndarray, rest: tuple) -> None:
    """Runs a compiled loop on torch's number of threads, each on its part of the rows."""
    num, threads = len(by_row[0]), torch.get_num_threads()
    parts = slices(num, max(16, -(-num // threads)))
    run_in_threads(lambda part: loop(*(array[part] for array in by_row), *rest), parts)
