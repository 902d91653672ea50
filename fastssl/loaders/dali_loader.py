"""Images decoded by NVIDIA DALI, each once and whole; DALI is given their encoded bytes in our order."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

import numpy as np
import torch
from torch import Tensor

from fastssl.batch import ImageBatch
from fastssl.data_prep.work_pool import ahead
from fastssl.loaders.dali_decode import DEPTH, DaliFailed, JpegDecoder
from fastssl.loaders.dali_read import Item, ItemReader
from fastssl.loaders.encoded import open_encoded
from fastssl.loaders.folder_loader import default_workers
from fastssl.loaders.order import FULL, Order, count_batches, eval_shares, train_shares
from fastssl.loaders.prefetch import Prefetcher
from fastssl.loaders.recycle import RecycledBuffers
from fastssl.threads import reader_threads

_CHUNK = 16  # images per task at most


class DaliLoader:
    """Loader of a folder, a .beton file of JPEGs, or tar shards; the contract is `make.Loader`.

    on_bad_image: as in `FolderLoader`. On a CPU the pixels are those of the folder loader, as both use libjpeg-turbo;
    on a GPU nvJPEG may differ by a few grey levels. read_ahead: see `Prefetcher`; here of encoded images.
    Raises ValueError when there are fewer images than one global batch, or DALI is not installed.
    """

    def __init__(
        self,
        data: str | os.PathLike,
        *,
        batch_size: int,
        seed: int,
        device: torch.device | str,
        rank: int = 0,
        world_size: int = 1,
        order: Order = FULL,
        workers: int | None = None,
        on_bad_image: str = "skip",
        class_names: Sequence[str] | None = None,
        read_ahead: int | None = None,
    ) -> None:
        encoded = open_encoded(data, class_names)
        self.num_images, self.class_names, self.notices = len(encoded.label), encoded.class_names, encoded.notices
        self.batches_per_epoch = count_batches(self.num_images, batch_size, world_size)
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.order, self.workers = order, workers or default_workers()
        self._reader = ItemReader(encoded, on_bad_image)
        self._prefetcher = Prefetcher(device, read_ahead)
        self._buffers = RecycledBuffers()
        self._make_decoder(1)  # so that an error is raised now and not when the run has begun

    @property
    def bad_images(self) -> list[str]:
        """The unreadable images met so far, "name: reason", in the order in which they were met."""
        return self._reader.images.messages

    @property
    def decoded(self) -> int:
        """Images decoded so far."""
        return self._reader.images.decoded

    def batches(self, first: int = 0) -> Iterator[ImageBatch]:
        """Batches first, first + 1, ... of this rank, of `batch_size` images each, without end."""
        shares = train_shares(
            self.num_images, self.batch_size, self.seed, self.rank, self.world_size, first, order=self.order
        )
        return self._prefetcher.iterate(self._decode(self._read(shares, True), self.batch_size, True))

    def eval_batches(
        self, batch_size: int, rank: int = 0, world_size: int = 1, limit: int | None = None
    ) -> Iterator[ImageBatch]:
        """This rank's contiguous part of all images, or of `limit` evenly spread ones, in file order."""
        shares = eval_shares(self.num_images, batch_size, rank, world_size, limit)
        return self._prefetcher.iterate(self._decode(self._read(shares, False), batch_size, False))

    def close(self) -> None:
        """Ends all threads; iterators in use raise RuntimeError."""
        self._prefetcher.close()

    def _read(self, shares: Iterator[Tensor], replace: bool) -> Iterator[list[Item]]:
        """The images of each share, read by threads."""

        def read_chunk(chunk: list[int]) -> list[Item]:
            items = [self._reader.read(i, replace) for i in chunk]
            return [item for item in items if item is not None]

        def start(share: Tensor) -> list[Future]:
            chunks = share.split(max(1, min(_CHUNK, len(share) // (2 * self.workers))))
            return [pool.submit(read_chunk, chunk.tolist()) for chunk in chunks]

        pool = reader_threads(self.workers, "fastssl-read", self._prefetcher.device)
        try:
            for futures in ahead(map(start, shares), self._prefetcher.read_ahead):
                yield [item for future in futures for item in future.result()]
        finally:
            pool.shutdown(cancel_futures=True)

    def _decode(self, batches: Iterator[list[Item]], max_batch: int, replace: bool) -> Iterator[ImageBatch]:
        """Packed batches in their order; while DALI decodes one, it is already given the next."""
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

    def _make_decoder(self, max_batch: int) -> JpegDecoder:
        return JpegDecoder(max_batch, self.workers, self._prefetcher.device)

    def _set_aside_refused(self, waiting: deque[list[Item]], replace: bool, error: DaliFailed) -> None:
        """Tries every image alone, and leaves those that DALI cannot decode to Pillow.

        Raises `error` if DALI decodes each of them, so that no image is at fault.
        """
        jpegs = [item for items in waiting for item in items if item.jpeg is not None]
        refused = {item.index for item in jpegs if not self._decodes(item.jpeg)}
        if not refused:
            raise error
        self._reader.refused |= refused
        for n, items in enumerate(waiting):
            again = [self._reader.read(item.index, replace) if item.index in refused else item for item in items]
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
        device = self._prefetcher.device
        if device.type == "cuda":
            return torch.empty(num_bytes, dtype=torch.uint8, device=device)
        return torch.from_numpy(self._buffers.take(num_bytes))

    def _pack(self, decoder: JpegDecoder, items: list[Item]) -> ImageBatch:
        """A batch in the order of `items`; its buffer holds first the images DALI has decoded, then Pillow's."""
        rows = sorted(range(len(items)), key=lambda n: items[n].jpeg is None)
        others = [items[n].pixels for n in rows if items[n].jpeg is None]
        extra = sum(image.size for image in others)
        pixels, shapes = decoder.receive(lambda num_bytes: self._allocate(num_bytes + extra))
        self._reader.images.count(len(shapes))
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
