"""Reuses host memory for batches, because fresh pages cost more than the copy that fills them."""

from __future__ import annotations

import threading
import weakref

import numpy as np
import torch
from torch import Tensor

_KEPT = 4  # buffers kept for reuse: a reader rarely holds more batches at once
_ROOM = 1.125  # buffers are larger than requested by this factor, as the next batch is rarely of exactly that size


class RecycledBuffers:
    """Gives out uint8 tensors in host memory, which is used again once a tensor and all views of it are gone.

    device: where they will be copied. For a GPU they are in pinned memory, whose reuse torch's events guard.
    """

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._free: list[np.ndarray] = []
        self._lock = threading.RLock()  # the garbage collector may return an array while one is taken

    def take(self, num_bytes: int) -> Tensor:
        """A (num_bytes,) uint8 tensor with undefined content."""
        if self._pinned:
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        with self._lock:
            fitting = [buffer for buffer in self._free if len(buffer) >= num_bytes]
            buffer = min(fitting, key=len, default=None)
            self._free = [other for other in self._free if other is not buffer]
        if buffer is None:
            buffer = np.empty(int(num_bytes * _ROOM), dtype=np.uint8)
        view = np.frombuffer(memoryview(buffer), dtype=np.uint8, count=num_bytes)
        weakref.finalize(view, self._give_back, buffer).atexit = False
        return torch.from_numpy(view)

    def _give_back(self, buffer: np.ndarray) -> None:
        with self._lock:
            self._free.append(buffer)
            self._free = sorted(self._free, key=len)[-_KEPT:]
