"""Batches of images decoded by NVIDIA DALI, which is given their encoded bytes in our order."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np
import torch
from torch import Tensor

from fastssl.batch import ImageBatch
from fastssl.data_prep.work_pool import ahead
from fastssl.loaders.dali_decode import DEPTH, DaliFailed, JpegDecoder
from fastssl.loaders.dali_read import Item, ItemReader
from fastssl.loaders.encoded import EncodedImages
from fastssl.loaders.pending import split_rows
from fastssl.loaders.prefetch import Prefetcher, count_workers
from fastssl.loaders.recycle import RecycledBuffers
from fastssl.machine.threads import reader_threads


class DaliDecoder:
    """Makes batches of `encoded` JPEGs; the contract is `stream_loader.Decoder`.

    On a CPU the pixels are those of `FileDecoder`, as both use libjpeg-turbo; on a GPU nvJPEG may differ by a few grey
    levels. workers: None for this process's share of the cores. read_ahead: see `Prefetcher`; here of encoded images.
    on_bad_image: see `BadImages`. Raises ValueError when DALI is not installed.
    """

    def __init__(
        self,
        encoded: EncodedImages,
        device: torch.device | str,
        workers: int | None = None,
        read_ahead: int | None = None,
        on_bad_image: str = "skip",
    ) -> None:
        self.label, self.class_names, self.folder = encoded.label, encoded.class_names, encoded.folder
        self.workers = count_workers(workers)
        self.reader = ItemReader(encoded, on_bad_image)
        self.images = self.reader.images
        self.prefetcher = Prefetcher(device, read_ahead)
        self._buffers = RecycledBuffers(torch.device("cpu"))
        self._make_decoder(1)  # so that an error is raised now and not when the run has begun

    def batches(self, shares: Iterator[Tensor], replace: bool) -> Iterator[ImageBatch]:
        """Batches on the device, see `stream_loader.Decoder`; while DALI decodes one, it is already given the next."""
        first = next(shares, None)
        if first is None:
            return
        max_batch, batches = len(first), self._read(itertools.chain([first], shares), replace)
        decoder = self._make_decoder(max_batch)
        waiting: deque[list[Item]] = deque()
        try:
            for items in itertools.chain(batches, [None] * DEPTH):
                if items:
                    waiting.append(items)
                    decoder.submit(_jpegs(items))
                while waiting and (len(waiting) == DEPTH or items is None):
                    try:
                        batch = self._pack(decoder, waiting[0])
                    except DaliFailed as error:
                        self._set_aside_refused(waiting, replace, error)
                        decoder = self._make_decoder(max_batch)
                        for again in waiting:
                            decoder.submit(_jpegs(again))
                        continue
                    waiting.popleft()
                    if batch.size:
                        yield batch
        finally:
            batches.close()

    def _read(self, shares: Iterator[Tensor], replace: bool) -> Iterator[list[Item]]:
        """The images of each share, read by threads."""

        def read_chunk(chunk: list[int]) -> list[Item]:
            items = [self.reader.read(i, replace) for i in chunk]
            return [item for item in items if item is not None]

        def start(share: Tensor) -> list[Future]:
            return [pool.submit(read_chunk, share[rows].tolist()) for rows in split_rows(len(share), self.workers)]

        pool = reader_threads(self.workers, "fastssl-read", self.prefetcher.device)
        try:
            for futures in ahead(map(start, shares), self.prefetcher.read_ahead):
                yield [item for future in futures for item in future.result()]
        finally:
            pool.shutdown(cancel_futures=True)

    def _make_decoder(self, max_batch: int) -> JpegDecoder:
        return JpegDecoder(max_batch, self.workers, self.prefetcher.device)

    def _set_aside_refused(self, waiting: deque[list[Item]], replace: bool, error: DaliFailed) -> None:
        """Tries every image alone, and leaves those that DALI cannot decode to Pillow.

        Raises `error` if DALI decodes each of them, so that no image is at fault.
        """
        jpegs = [item for items in waiting for item in items if item.jpeg is not None]
        refused = {item.index for item in jpegs if not self._decodes(item.jpeg)}
        if not refused:
            raise error
        self.reader.refused |= refused
        for n, items in enumerate(waiting):
            again = [self.reader.read(item.index, replace) if item.index in refused else item for item in items]
            waiting[n] = [item for item in again if item is not None]

    def _decodes(self, jpeg: np.ndarray) -> bool:
        try:
            decoder = self._make_decoder(1)
            decoder.submit([jpeg])
            decoder.receive(self._allocate)
        except DaliFailed:
            return False
        return True

    def _allocate(self, num_bytes: int) -> Tensor:
        device = self.prefetcher.device
        if device.type == "cuda":
            return torch.empty(num_bytes, dtype=torch.uint8, device=device)
        return self._buffers.take(num_bytes)

    def _pack(self, decoder: JpegDecoder, items: list[Item]) -> ImageBatch:
        """A batch in the order of `items`; its buffer holds first the images DALI has decoded, then Pillow's."""
        rows = sorted(range(len(items)), key=lambda n: items[n].jpeg is None)
        others = [items[n].pixels for n in rows if items[n].jpeg is None]
        extra = sum(image.size for image in others)
        pixels, shapes = decoder.receive(lambda num_bytes: self._allocate(num_bytes + extra))
        self.images.count(len(shapes))
        shapes = np.concatenate([shapes, np.array([image.shape[:2] for image in others], np.int64).reshape(-1, 2)])
        start = np.concatenate([[0], np.cumsum(shapes.prod(axis=1) * 3)])
        for image, at in zip(others, start[len(items) - len(others) :]):
            pixels[at : at + image.size].copy_(torch.from_numpy(image.reshape(-1)))
        place = np.argsort(rows)  # of each item, in the buffer
        return ImageBatch(
            pixels=pixels,
            offset=torch.from_numpy(start[:-1][place]),
            height=torch.from_numpy(shapes[place, 0].astype(np.int32)),
            width=torch.from_numpy(shapes[place, 1].astype(np.int32)),
            index=torch.tensor([item.index for item in items]),
            label=torch.tensor([item.label for item in items]),
            max_side=int(shapes.max(initial=1)),
        )


def _jpegs(items: list[Item]) -> list[np.ndarray]:
    return [item.jpeg for item in items if item.jpeg is not None]
