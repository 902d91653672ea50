"""Decodes batches of image files of any kind: plain JPEGs by libjpeg-turbo, straight into the batch, others by Pillow.

Pillow uses libjpeg-turbo too, but takes twice the time for a small photograph: it is Python around each image and
copies the pixels three times. Only files of which both make the same pixels go past it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastssl.batch import ImageBatch
from fastssl.data_prep.decode import MAX_PIXELS, BadImage
from fastssl.data_prep.jpeg import JpegFacts, NotPlain, read_jpeg_facts
from fastssl.data_prep.work_pool import ahead
from fastssl.loaders.bad_images import BadImages
from fastssl.loaders.encoded import EncodedImages
from fastssl.loaders.memory import folder_pixel_bytes
from fastssl.loaders.pending import PendingBatch, finish_batch, split_rows, start_batch
from fastssl.loaders.prefetch import Prefetcher, count_workers
from fastssl.loaders.recycle import RecycledBuffers
from fastssl.machine.threads import reader_threads

try:
    from fastssl.loaders.jpeg_decode import decode_stored_images
except ImportError:  # no libturbojpeg: Pillow decodes all files, and `make_loader` says so
    decode_stored_images = None

# Grey, 4:4:4, 4:2:2, 4:2:0: of these libjpeg-turbo 2.1 and Pillow's own 3.2 made the same pixels in every test.
_SAMPLINGS = {(0x11,), (0x11, 0x11, 0x11), (0x21, 0x11, 0x11), (0x22, 0x11, 0x11)}


class _File(NamedTuple):
    """A plain JPEG that has been read, or an image that Pillow has decoded."""

    index: int  # of the image wanted
    record: int  # of the image it is: the same, or that of a replacement
    height: int
    width: int
    jpeg: bytes | None
    pixels: np.ndarray | None  # (H, W, 3) uint8


class FileDecoder:
    """Makes batches of `encoded` images with `workers` threads; the contract is `stream_loader.Decoder`.

    workers: None for this process's share of the cores. read_ahead: see `Prefetcher`. on_bad_image: see `BadImages`.
    """

    def __init__(
        self,
        encoded: EncodedImages,
        device: torch.device | str,
        workers: int | None = None,
        read_ahead: int | None = None,
        on_bad_image: str = "skip",
    ) -> None:
        self.encoded, self.folder = encoded, encoded.folder
        self.label, self.class_names = encoded.label, encoded.class_names
        self.workers = count_workers(workers)
        self.images = BadImages(on_bad_image, len(encoded.label), encoded.decode)
        self.prefetcher = Prefetcher(device, read_ahead)
        self._buffers = RecycledBuffers(self.prefetcher.device)

    def pixel_bytes(self, chosen: Iterable[int]) -> int:
        """The decoded size in bytes of the chosen images of a folder, from their headers."""
        return folder_pixel_bytes(self.folder, chosen, self.workers)

    def batches(self, shares: Iterator[Tensor], replace: bool) -> Iterator[ImageBatch]:
        """CPU batches, see `stream_loader.Decoder`."""
        pool = reader_threads(self.workers, "fastssl-decode", self.prefetcher.device)
        read_ahead = min(1, self.prefetcher.read_ahead)  # batches of files, beside those being decoded
        try:
            reading = ahead((self._start_reading(pool, share.tolist(), replace) for share in shares), read_ahead)
            decoding = (self._start_decoding(pool, futures) for futures in reading)
            for pending in ahead(decoding, self.prefetcher.read_ahead - read_ahead):
                batch = finish_batch(pending, self.images, self.encoded.label, replace)
                if batch.size:
                    yield batch
        finally:
            pool.shutdown(cancel_futures=True)

    def _start_reading(self, pool: ThreadPoolExecutor, share: list[int], replace: bool) -> list[Future]:
        def read(chunk: list[int]) -> list[_File]:
            files = [self._read(index, replace) for index in chunk]
            return [file for file in files if file is not None]

        return [pool.submit(read, share[rows]) for rows in split_rows(len(share), self.workers)]

    def _start_decoding(self, pool: ThreadPoolExecutor, reading: list[Future]) -> PendingBatch:
        files = [file for future in reading for file in future.result()]
        index = np.array([file.index for file in files], np.int64)
        record = np.array([file.record for file in files], np.int64)
        height = np.array([file.height for file in files], np.int32)
        width = np.array([file.width for file in files], np.int32)

        def decode(rows: slice, pixels: np.ndarray, offset: np.ndarray) -> list[int]:
            return self._decode(files[rows], pixels, offset)

        return start_batch(index, record, height, width, self._buffers, decode, pool, self.workers)

    def _read(self, index: int, replace: bool) -> _File | None:
        record = self.images.next_readable(index) if replace else index
        if (plain := self._read_plain(record)) is not None:
            data, facts = plain
            return _File(index, record, facts.height, facts.width, data, None)
        if replace:
            pixels, record = self.images.load_replacing(index)
        else:
            pixels = self.images.load(index)
        return None if pixels is None else _File(index, record, *pixels.shape[:2], None, pixels)

    def _read_plain(self, record: int) -> tuple[bytes, JpegFacts] | None:
        """A JPEG's bytes and facts, if libjpeg-turbo makes Pillow's pixels from it or fails; None for other files."""
        if decode_stored_images is None or record in self.images:
            return None
        try:
            data = self.encoded.read(record)
            facts = read_jpeg_facts(data, header_only=True)
        except (BadImage, NotPlain):  # Pillow will say what is wrong with it, if anything
            return None
        fits = facts.sampling in _SAMPLINGS and facts.width * facts.height <= MAX_PIXELS
        return (data, facts) if fits else None

    def _decode(self, files: Sequence[_File], pixels: np.ndarray, offset: np.ndarray) -> list[int]:
        """Writes the files' pixels to `pixels`, each at its offset; returns which cannot be decoded."""
        jpegs = [n for n, file in enumerate(files) if file.jpeg is not None]
        failed = {jpegs[i] for i in _decode_jpegs([files[n] for n in jpegs], pixels, offset[jpegs])}
        self.images.count(len(jpegs) - len(failed))
        bad = []
        for n, file in enumerate(files):
            # what libjpeg-turbo cannot decode, or not without a warning, Pillow may; otherwise it says why not
            image = self.images.load(file.record) if n in failed else file.pixels
            if image is not None:
                if image.shape[:2] != (file.height, file.width):
                    raise ValueError(f"{self.encoded.name(file.record)} changed while it was being read: start again")
                pixels[offset[n] : offset[n] + image.size] = image.reshape(-1)
            elif n in failed:
                bad.append(n)
        return bad


def _decode_jpegs(files: list[_File], pixels: np.ndarray, offset: np.ndarray) -> list[int]:
    """Decodes plain JPEGs with libjpeg-turbo; returns which it could not, or not without a warning."""
    if not files:
        return []
    source = np.array([np.frombuffer(file.jpeg, np.uint8).ctypes.data for file in files])
    size = np.array([len(file.jpeg) for file in files])
    height = np.array([file.height for file in files], np.int32)
    width = np.array([file.width for file in files], np.int32)
    return list(decode_stored_images(source, size, np.zeros(len(files), bool), height, width, pixels, offset))
