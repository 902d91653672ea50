"""Decodes batches of images of a .beton file with libjpeg-turbo, straight into the batch.

This does not use FFCV's `Loader`, which decodes once per view, overwrites a batch while it is read, leaves a thread
behind at every `break`, hangs when one dies, and gives another image's pixels for an image that it cannot decode.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from fastssl.batch import ImageBatch
from fastssl.data_prep.beton_format import RAW
from fastssl.data_prep.decode import BadImage, decode_image
from fastssl.data_prep.work_pool import ahead
from fastssl.loaders.bad_images import BadImages
from fastssl.loaders.beton_file import BetonFile
from fastssl.loaders.jpeg_decode import FATAL, decode_stored_images
from fastssl.loaders.pending import PendingBatch, finish_batch, start_batch
from fastssl.loaders.prefetch import Prefetcher, count_workers
from fastssl.loaders.recycle import RecycledBuffers
from fastssl.machine.threads import reader_threads


class BetonDecoder:
    """Makes batches of a file's images with `workers` threads; the contract is `stream_loader.Decoder`.

    The file may be from any FFCV 1.0 writer (jpg, raw, proportion, smart). cache: see `StoredImages`. workers: None for
    this process's share of the cores. read_ahead: see `Prefetcher`. on_bad_image: see `BadImages`.
    """

    def __init__(
        self,
        beton: BetonFile,
        cache: str,
        device: torch.device | str,
        workers: int | None = None,
        read_ahead: int | None = None,
        on_bad_image: str = "skip",
    ) -> None:
        self.beton, self.label, self.class_names, self.folder = beton, beton.label, beton.class_names, None
        self.workers = count_workers(workers)
        self._stored = StoredImages(beton, cache)
        self.images = BadImages(on_bad_image, len(beton), self._stored.decode_one)
        self.prefetcher = Prefetcher(device, read_ahead)
        self._buffers = RecycledBuffers(self.prefetcher.device)

    def pixel_bytes(self, chosen: Iterable[int]) -> int:
        """The decoded size in bytes of the chosen images."""
        return int(self.beton.pixel_bytes[np.asarray(chosen)].sum())

    def batches(self, shares: Iterator[Tensor], replace: bool) -> Iterator[ImageBatch]:
        """CPU batches, see `stream_loader.Decoder`."""
        pool = reader_threads(self.workers, "fastssl-decode", self.prefetcher.device)
        try:
            started = (self._start(pool, share.numpy().copy(), replace) for share in shares)
            # so many batches are started ahead that the threads need not wait for the slowest image of a batch
            for pending in ahead(started, self.prefetcher.read_ahead):
                batch = finish_batch(pending, self.images, self.label, replace)
                if batch.size:
                    yield batch
        finally:
            pool.shutdown(cancel_futures=True)

    def _start(self, pool: ThreadPoolExecutor, index: np.ndarray, replace: bool) -> PendingBatch:
        """Starts to read the bytes of a batch from the disk, and to decode them."""
        record = index
        if self.images.messages:
            if not replace:
                index = index[[i not in self.images for i in index.tolist()]]
            record = np.array([self.images.next_readable(i) for i in index.tolist()], np.int64)
        self._stored.read_ahead(record)

        def decode(rows: slice, pixels: np.ndarray, offset: np.ndarray) -> list[int]:
            return self._stored.decode(record[rows], pixels, offset, self.images)

        height, width = self.beton.height[record], self.beton.width[record]
        return start_batch(index, record, height, width, self._buffers, decode, pool, self.workers)


class StoredImages:
    """Decodes images of one file into given memory. Thread-safe.

    cache: "page" decodes from the memory-mapped file; "process" first reads each image's bytes with read(), for file
    systems on which mapped files are slow, or on which a failing read must not kill the process (SIGBUS).
    Raises ValueError for another cache.
    """

    def __init__(self, beton: BetonFile, cache: str) -> None:
        if cache not in ("page", "process"):
            raise ValueError(f"--beton-cache must be 'page' or 'process', got {cache!r}")
        self.beton, self.cache = beton, cache
        self._file = os.open(beton.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def decode(self, record: np.ndarray, pixels: np.ndarray, offset: np.ndarray, images: BadImages) -> list[int]:
        """Decodes the images `record` (n,) int64 into `pixels` (P,) uint8 at `offset` (n,) int64.

        Returns which of the n cannot be decoded; the content of their windows is undefined. images: a `BadImages` of
        `decode_one`, which counts and remembers them, and raises ValueError with policy "error".
        """
        failed = self._decode_stored(record, pixels, offset)
        images.count(len(record) - len(failed))
        bad = []
        for i in failed:
            image = images.load(int(record[i]))  # tries again with `decode_one`, which knows more formats, and says why
            if image is None:
                bad.append(i)
            else:
                pixels[offset[i] : offset[i] + image.size] = image.reshape(-1)
        return bad

    def decode_one(self, i: int) -> np.ndarray:
        """Image i, (H, W, 3) uint8. Raises BadImage.

        An image that libjpeg-turbo decodes with a warning is damaged. One that it cannot decode (CMYK, another format)
        is decoded by the folder loader's function, so that the loaders agree.
        """
        height, width = int(self.beton.height[i]), int(self.beton.width[i])
        pixels = np.empty(height * width * 3, np.uint8)
        failed = self._decode_stored(np.array([i]), pixels, np.zeros(1, np.int64))
        if not failed:
            return pixels.reshape(height, width, 3)
        status, reason = failed[0]
        if status != FATAL:
            raise BadImage(self.beton.name(i), reason)
        image = decode_image(bytes(self.beton.bytes(i)), self.beton.name(i))
        if image.shape[:2] != (height, width):
            found = f"{image.shape[1]} x {image.shape[0]}"
            raise BadImage(self.beton.name(i), f"it is {found} but the index says {width} x {height}")
        return image

    def _decode_stored(self, record: np.ndarray, pixels: np.ndarray, offset: np.ndarray) -> dict[int, tuple[int, str]]:
        beton = self.beton
        if os.fstat(self._file).st_size < len(beton.data):  # reading beyond the end would kill the process (SIGBUS)
            raise ValueError(f"{beton.path} was truncated while it was read: copy it again")
        data, pointer, size = beton.data, beton.pointer[record], beton.size[record]
        if self.cache == "process":
            data, pointer = self._read(pointer, size), np.cumsum(size) - size
        height, width, raw = beton.height[record], beton.width[record], beton.mode[record] == RAW
        return decode_stored_images(data.ctypes.data + pointer, size, raw, height, width, pixels, offset)

    def _read(self, pointer: np.ndarray, size: np.ndarray) -> np.ndarray:
        """The stored bytes of some images, back to back."""
        data = np.empty(int(size.sum()), np.uint8)
        place = 0
        for start, count in zip(pointer.tolist(), size.tolist()):
            while count:
                got = os.preadv(self._file, [memoryview(data)[place : place + count]], start)
                if not got:
                    raise ValueError(f"{self.beton.path} was truncated while it was read: copy it again")
                place, start, count = place + got, start + got, count - got
        return data

    def read_ahead(self, record: np.ndarray) -> None:
        """Asks the system to read the bytes of these images now; otherwise it would read them one by one, on access."""
        if hasattr(os, "posix_fadvise"):
            for start, size in zip(self.beton.pointer[record].tolist(), self.beton.size[record].tolist()):
                os.posix_fadvise(self._file, start, size, os.POSIX_FADV_WILLNEED)
