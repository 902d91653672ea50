"""How much memory an evaluation may still use under --max-mem-gb, and features on disk when that is not enough."""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import weakref

import numpy as np
import torch
from torch import Tensor

GB = 2**30
_LEAST = 96 * 2**20  # bytes: with less left, an evaluation gives up
_SHARE_OF_GPU = 0.4  # of the GPU's free memory, for features


class DiskRows:
    """(n, C) float16 rows in an unnamed temporary file, mapped only in pieces, since mapped pages count as memory.

    It is read and written like a tensor: `rows[slice]` and `rows[index]` give CPU tensors.
    """

    dtype = torch.float16

    def __init__(self, num_rows: int, width: int) -> None:
        self.shape, self.ndim, self.device = (num_rows, width), 2, torch.device("cpu")
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the rows; the system removes it)
        weakref.finalize(self, self._file.close)
        try:
            os.posix_fallocate(self._file.fileno(), 0, max(1, num_rows * width * 2))  # a full disk fails here
        except OSError as error:
            raise ValueError(
                f"{tempfile.gettempdir()} has no room for {num_rows * width * 2 / GB:.2f} GB of features "
                f"({error.strerror}): set TMPDIR to a folder on a larger disk, or raise --max-mem-gb"
            ) from error

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        if isinstance(rows, slice):
            first, end, _ = rows.indices(len(self))
            return torch.from_numpy(np.array(self._map(first, end)))
        flat = rows.reshape(-1).numpy()
        return torch.from_numpy(self._map(0, len(self))[flat]).view(*rows.shape, -1)

    def __setitem__(self, rows: slice, features: Tensor) -> None:
        """Raises ValueError when a feature overflows float16."""
        half = features.to("cpu", torch.float16)
        if not bool(torch.isfinite(half).all()):
            raise ValueError("a feature is too large for float16 (65504): use --rep-space norm, or raise --max-mem-gb")
        first, end, _ = rows.indices(len(self))
        self._map(first, end)[:] = half.numpy()

    def truncate(self, num_rows: int) -> DiskRows:
        """Keeps only the first `num_rows` rows."""
        self.shape = (num_rows, self.shape[1])
        return self

    def _map(self, first: int, end: int) -> np.ndarray:
        if first >= end:
            return np.empty((0, self.shape[1]), dtype=np.float16)
        width = self.shape[1]
        return np.memmap(self._file, np.float16, "r+", offset=first * width * 2, shape=(end - first, width))


Rows = Tensor | DiskRows


class Memory:
    """The memory of this process under the limit of --max-mem-gb, or without one."""

    def __init__(self, max_mem_gb: float | None, device: torch.device) -> None:
        self.cap = None if max_mem_gb is None else int(max_mem_gb * GB)
        self.device = device

    def left(self) -> int:
        """Bytes that may still be used: the cap minus the peak so far. Raises ValueError when that is too little."""
        if self.cap is None:
            return 4 * GB
        used = peak_memory()
        if self.cap - used < _LEAST:
            raise ValueError(
                f"--max-mem-gb {self.cap / GB:g} is too little: the program, the encoder and a batch take "
                f"{used / GB:.2f} GB, so give at least {(used + 2 * _LEAST) / GB:.2f}, or a smaller --batch-size"
            )
        return self.cap - used

    def check(self, size: int, what: str) -> None:
        """Raises ValueError when `size` bytes are more than half of what may still be used."""
        if self.cap is not None and size > self.left() // 2:
            raise ValueError(
                f"--max-mem-gb {self.cap / GB:g} is too little for {size / GB:.2f} GB of {what}: give at least "
                f"{(peak_memory() + 2 * size) / GB:.2f}"
            )

    def make_rows(self, num_rows: int, width: int) -> Rows:
        """Room for (n, C) features: float32 on the device or in memory, or float16 on disk if memory is short."""
        size = num_rows * width * 4
        if self.device.type == "cuda" and size < _SHARE_OF_GPU * torch.cuda.mem_get_info(self.device)[0]:
            return torch.empty(num_rows, width, device=self.device)
        if self.cap is not None and size > 0.4 * self.left():
            return DiskRows(num_rows, width)
        return torch.empty(num_rows, width)

    def chunks(self, num_queries: int, num_rows: int, width: int, k: int) -> tuple[int, int]:
        """(queries, bank rows) to compare at once in a search for k neighbours, so that it fits into what is left."""
        query_chunk, bank_chunk = min(4096, max(1, num_queries)), min(16384, max(1, num_rows))
        if self.cap is None:
            return query_chunk, bank_chunk
        room = self.left() // 2

        def need() -> int:
            distances = query_chunk * (bank_chunk * 8 + 4 * (k + 16) * 12)
            return distances + bank_chunk * width * 20 + query_chunk * width * 24 + 80 * 2**20

        while need() > room and max(query_chunk, bank_chunk) > 64:
            if bank_chunk > 2 * query_chunk:
                bank_chunk = max(64, bank_chunk // 2)
            else:
                query_chunk = max(1, query_chunk // 2)
                bank_chunk = min(bank_chunk, max(64, 8 * query_chunk))
        return query_chunk, bank_chunk


def peak_memory() -> int:
    """The most bytes this program ever held in memory."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):  # not Linux, where getrusage would also count what this process was before exec
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
