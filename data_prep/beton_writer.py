"""Writes a .beton file record by record, and computes a checksum of every block of the file."""

from __future__ import annotations

import hashlib
import math
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

import numpy as np

from fastssl.data_prep.beton_format import (
    ALLOCATION,
    DESCRIPTOR,
    FRONT,
    HEADER,
    IMAGE_FIELD,
    INT_FIELD,
    SAMPLE,
    VERSION,
)
from fastssl.data_prep.prepare import Prepared

BLOCK = 1 << 23  # bytes under one checksum; also FFCV's usual page size


class BetonWriter:
    """Writes records in the order they are added, and the tables in `finish`.

    A record never crosses the end of a page. A record larger than a page doubles the page size, which does no harm to
    earlier records: what fits into a small page fits into a large one.
    """

    def __init__(self, file: BinaryIO, capacity: int) -> None:
        self._file = file
        self._samples = np.zeros(capacity, SAMPLE)
        self._allocations = np.zeros(capacity, ALLOCATION)
        self._page_size = BLOCK
        self._start = math.ceil((FRONT + self._samples.nbytes) / BLOCK) * BLOCK  # where the records begin
        self._flushed = self._start  # position in the file of the buffer's first byte
        self._buffer = bytearray()
        self._sums: list[Future[str]] = []
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="fastssl-write")  # writes while the buffer fills
        self.num_images = 0
        file.seek(self._start)

    def add(self, image: Prepared, label: int) -> None:
        """Adds one image."""
        pointer = self._room_for(len(image.data))
        i, self.num_images = self.num_images, self.num_images + 1
        self._samples[i] = (image.mode, image.width, image.height, pointer), label
        self._allocations[i] = i, pointer, len(image.data)
        self._buffer += image.data
        self._flush(whole=False)

    def close(self) -> None:
        """Waits for the write in progress, if any, and drops the others."""
        self._writer.shutdown(cancel_futures=True)

    def finish(self) -> list[str]:
        """Writes the tables; returns the SHA-256 of every block of the file, in hex. Raises OSError when that fails."""
        self._buffer += bytes(-len(self._buffer) % 64)
        header = np.zeros(1, HEADER)
        allocations_at = self._flushed + len(self._buffer)
        header[0] = VERSION, 2, self._page_size, self.num_images, allocations_at
        self._buffer += self._allocations[: self.num_images].tobytes()
        self._flush(whole=True)
        fields = np.zeros(2, DESCRIPTOR)
        fields["type"], fields["name"] = (IMAGE_FIELD, INT_FIELD), (b"image", b"label")
        front = header.tobytes() + fields.tobytes() + self._samples[: self.num_images].tobytes()
        front += bytes(self._start - len(front))
        sums = [written.result() for written in self._sums]
        self._file.seek(0)
        return [self._write(front[at : at + BLOCK]) for at in range(0, len(front), BLOCK)] + sums

    def _room_for(self, size: int) -> int:
        """The position of the next record; pads the file up to there."""
        while size > self._page_size:
            self._page_size *= 2
        at = self._flushed + len(self._buffer)
        if at // self._page_size != (at + size - 1) // self._page_size:
            padding = -at % self._page_size
            self._buffer += bytes(padding)
            at += padding
        return at

    def _flush(self, whole: bool) -> None:
        while len(self._buffer) >= BLOCK or (whole and self._buffer):
            block = bytes(self._buffer[:BLOCK])
            del self._buffer[:BLOCK]
            if len(self._sums) > 1:
                self._sums[-2].result()  # at most two blocks wait for the disk; raises what writing raised
            self._sums.append(self._writer.submit(self._write, block))
            self._flushed += len(block)

    def _write(self, block: bytes) -> str:
        """Writes the next block of the file; returns its SHA-256."""
        self._file.write(block)
        return hashlib.sha256(block).hexdigest()
