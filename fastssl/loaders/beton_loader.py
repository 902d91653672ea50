"""Images from a .beton file, each decoded once, whole and at its own size, by threads that run libjpeg-turbo.

This does not use FFCV's `Loader`, which decodes once per view, overwrites a batch while it is read, leaves a thread
behind at every `break`, hangs when one dies, and gives another image's pixels for an image that it cannot decode.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from fastssl.batch import ImageBatch
from fastssl.data_prep.work_pool import ahead
from fastssl.loaders.bad_images import BadImages
from fastssl.loaders.beton_decode import BetonDecoder
from fastssl.loaders.beton_file import open_beton
from fastssl.loaders.folder_loader import default_workers
from fastssl.loaders.order import FULL, Order, count_batches, eval_shares, train_shares
from fastssl.loaders.pending import PendingBatch, finish_batch, start_batch
from fastssl.loaders.prefetch import Prefetcher
from fastssl.loaders.recycle import RecycledBuffers
from fastssl.threads import reader_threads


class BetonLoader:
    """Loader of a .beton file from any FFCV 1.0 writer (jpg, raw, proportion, smart); the contract is `make.Loader`.

    cache: "page" or "process" (`BetonDecoder`). read_ahead: see `Prefetcher`. on_bad_image: as in `FolderLoader`.
    Raises ValueError as `open_beton` does, and when there are fewer images than one global batch.
    """

    notices: Sequence[str] = ()

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
        cache: str = "page",
    ) -> None:
        self.beton = open_beton(data, class_names)
        self.num_images, self.class_names, self.label = len(self.beton), self.beton.class_names, self.beton.label
        self.batches_per_epoch = count_batches(self.num_images, batch_size, world_size)
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.order, self.workers = order, workers or default_workers()
        self._decoder = BetonDecoder(self.beton, cache)
        self._images = BadImages(on_bad_image, self.num_images, self._decoder.decode_one)
        self._buffers = RecycledBuffers()
        self._prefetcher = Prefetcher(device, read_ahead)

    @property
    def bad_images(self) -> list[str]:
        """The unreadable images met so far, "path[i]: reason", in the order in which they were met."""
        return self._images.messages

    @property
    def decoded(self) -> int:
        """Images decoded so far."""
        return self._images.decoded

    def pixel_bytes(self, chosen: Sequence[int] | np.ndarray) -> int:
        """The decoded size of the chosen images in bytes."""
        return int(self.beton.pixel_bytes[np.asarray(chosen)].sum())

    def batches(self, first: int = 0) -> Iterator[ImageBatch]:
        """Batches first, first + 1, ... of this rank, of `batch_size` images each, without end."""
        shares = train_shares(
            self.num_images, self.batch_size, self.seed, self.rank, self.world_size, first, order=self.order
        )
        return self._prefetcher.iterate(self._decode_batches(shares, replace=True))

    def eval_batches(
        self, batch_size: int, rank: int = 0, world_size: int = 1, limit: int | None = None
    ) -> Iterator[ImageBatch]:
        """This rank's contiguous part of all images, or of `limit` evenly spread ones, in file order."""
        return self.read(eval_shares(self.num_images, batch_size, rank, world_size, limit))

    def read(self, shares: Iterator[Tensor], *, replace_bad: bool = False) -> Iterator[ImageBatch]:
        """See `FolderLoader.read`."""
        return self._prefetcher.iterate(self._decode_batches(shares, replace_bad))

    def close(self) -> None:
        """Ends all threads; iterators in use raise RuntimeError."""
        self._prefetcher.close()

    def _decode_batches(self, shares: Iterator[Tensor], replace: bool) -> Iterator[ImageBatch]:
        """CPU batches in the order of `shares`, whichever thread finishes first."""
        pool = reader_threads(self.workers, "fastssl-decode", self._prefetcher.device)
        try:
            started = (self._start(pool, share.numpy().copy(), replace) for share in shares)
            # so many batches are started ahead that the threads need not wait for the slowest image of a batch
            for pending in ahead(started, self._prefetcher.read_ahead):
                batch = finish_batch(pending, self._images, self.beton.label, replace)
                if batch.size:
                    yield batch
        finally:
            pool.shutdown(cancel_futures=True)

    def _start(self, pool: ThreadPoolExecutor, index: np.ndarray, replace: bool) -> PendingBatch:
        """Starts to read the bytes of a batch from the disk, and to decode them."""
        record = index
        if self._images.messages:
            if not replace:
                index = index[[i not in self._images for i in index.tolist()]]
            record = np.array([self._images.next_readable(i) for i in index.tolist()], np.int64)
        self._decoder.read_ahead(record)

        def decode(rows: slice, pixels: np.ndarray, offset: np.ndarray) -> list[int]:
            return self._decoder.decode(record[rows], pixels, offset, self._images)

        def allocate(num_bytes: int) -> Tensor:
            return self._buffers.take_for(self._prefetcher.device, num_bytes)

        height, width = self.beton.height[record], self.beton.width[record]
        return start_batch(index, record, height, width, allocate, decode, pool, self.workers)
