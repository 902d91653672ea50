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
    """Gives out uint8 arrays, and reuses the memory of an array once it and all views and tensors of it are gone."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._lock = threading.RLock()  # the garbage collector may return an array while one is taken

    def take(self, num_bytes: int) -> np.ndarray:
        """A (num_bytes,) uint8 array with undefined content."""
        with self._lock:
            fitting = [buffer for buffer in self._free if len(buffer) >= num_bytes]
            buffer = min(fitting, key=len, default=None)
            self._free = [other for other in self._free if other is not buffer]
        if buffer is None:
            buffer = np.empty(int(num_bytes * _ROOM), dtype=np.uint8)
        view = np.frombuffer(memoryview(buffer), dtype=np.uint8, count=num_bytes)
        weakref.finalize(view, self._give_back, buffer).atexit = False
        return view

    def take_for(self, device: torch.device, num_bytes: int) -> Tensor:
        """The same as a tensor; for a GPU in pinned memory, whose reuse torch's events guard."""
        if device.type == "cuda":
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        return torch.from_numpy(self.take(num_bytes))

    def _give_back(self, buffer: np.ndarray) -> None:
        with self._lock:
            self._free.append(buffer)
            self._free = sorted(self._free, key=len)[-_KEPT:]
