"""Images from a folder of files: each decoded once, whole, at its own size, by threads.

Threads, not processes: Pillow decodes without the GIL, and a decoded photograph costs more to send between processes
than that gains (1.3 times the CPU time and 0.85 of the rate, 500-pixel JPEGs, two threads or DataLoader workers).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fastssl.batch import ImageBatch, pack_images
from fastssl.data_prep.images import ImageFolder, decode_image, find_images
from fastssl.data_prep.work_pool import ahead, usable_cores
from fastssl.loaders.bad_images import BadImages
from fastssl.loaders.memory import folder_pixel_bytes
from fastssl.loaders.order import FULL, Order, count_batches, eval_shares, train_shares
from fastssl.loaders.prefetch import Prefetcher
from fastssl.loaders.recycle import RecycledBuffers
from fastssl.threads import reader_threads

_CHUNK = 16  # images per task at most: large enough that handing tasks out costs nothing

Decoded = tuple[np.ndarray, int, int]  # pixels (H, W, 3) uint8, index, label


class FolderLoader:
    """Loader over `root/train/<class>/*`, `root/<class>/*`, a flat folder or a listing; the contract is `make.Loader`.

    on_bad_image: "skip" gives the place of an unreadable image to the next readable one in file order (pixels and
    label are the replacement's; `index`, and so its augmentation, stay the place's own) and lists it in `bad_images`;
    "error" raises ValueError. An evaluation leaves unreadable images out instead. read_ahead: as in `Prefetcher`.
    Raises ValueError when the folder holds no images or fewer than one global batch.
    """

    def __init__(
        self,
        data: str | os.PathLike | ImageFolder,
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
        self.folder = data if isinstance(data, ImageFolder) else find_images(data, class_names)
        self.num_images, self.label = len(self.folder.paths), self.folder.labels
        self.class_names = self.folder.class_names
        self.batches_per_epoch = count_batches(self.num_images, batch_size, world_size)
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.workers = workers or default_workers()
        self.order = order
        path = self.folder.path  # not self: a loader in a cycle would keep its buffers until the garbage collector runs
        self._images = BadImages(on_bad_image, self.num_images, lambda i: decode_image(path(i)))
        self._prefetcher = Prefetcher(device, read_ahead)
        self._buffers = RecycledBuffers()

    @property
    def bad_images(self) -> list[str]:
        """The unreadable images met so far, "path: reason": a list that only grows at its end."""
        return self._images.messages

    @property
    def decoded(self) -> int:
        """Images decoded so far."""
        return self._images.decoded

    def pixel_bytes(self, chosen: Iterable[int]) -> int:
        """Bytes of the chosen images once they are decoded, by what their headers say."""
        return folder_pixel_bytes(self.folder, chosen, self.workers)

    def batches(self, first: int = 0) -> Iterator[ImageBatch]:
        """Batch first, first + 1, ... of this rank without end, each of `batch_size` images."""
        shares = train_shares(
            self.num_images, self.batch_size, self.seed, self.rank, self.world_size, first, order=self.order
        )
        return self._prefetcher.iterate(self._decode_batches(shares, self._load_replacing))

    def eval_batches(
        self, batch_size: int, rank: int = 0, world_size: int = 1, limit: int | None = None
    ) -> Iterator[ImageBatch]:
        """This rank's contiguous part of all images (or of `limit` evenly spread ones) in file order, tail included."""
        return self.read(eval_shares(self.num_images, batch_size, rank, world_size, limit))

    def read(self, shares: Iterator[Tensor], *, replace_bad: bool = False) -> Iterator[ImageBatch]:
        """The images of each (n,) tensor of indices, in its order, for evaluations with an order of their own.

        Unreadable images are left out (a batch without any is not given at all) or, with replace_bad, replaced.
        """
        load = self._load_replacing if replace_bad else self._load_or_leave_out
        return self._prefetcher.iterate(self._decode_batches(shares, load))

    def close(self) -> None:
        """Ends all threads; iterators still in use raise."""
        self._prefetcher.close()

    def _decode_batches(self, shares: Iterator[Tensor], load: Callable[[int], Decoded | None]) -> Iterator[ImageBatch]:
        """Packed CPU batches in the order of `shares`, however the threads finish; `load` maps an index to Decoded."""

        def load_chunk(chunk: list[int]) -> list[Decoded]:
            return [decoded for i in chunk if (decoded := load(i)) is not None]

        pool = reader_threads(self.workers, "fastssl-decode", self._prefetcher.device)
        begun = ([pool.submit(load_chunk, chunk) for chunk in self._chunks(share)] for share in shares)
        try:
            for tasks in ahead(begun, self._prefetcher.read_ahead):  # none waits for the slowest image of one batch
                if decoded := [image for task in tasks for image in task.result()]:
                    yield pack_images(*zip(*decoded), allocate=self._buffers.take)
        finally:
            pool.shutdown(cancel_futures=True)

    def _chunks(self, share: Tensor) -> list[list[int]]:
        size = max(1, min(_CHUNK, len(share) // (2 * self.workers)))
        return [chunk.tolist() for chunk in share.split(size)]

    def _load_or_leave_out(self, index: int) -> Decoded | None:
        pixels = self._images.load(index)
        return None if pixels is None else (pixels, index, int(self.folder.labels[index]))

    def _load_replacing(self, index: int) -> Decoded:
        pixels, used = self._images.load_replacing(index)
        return pixels, index, int(self.folder.labels[used])


def default_workers() -> int:
    """Cores this process may use, shared with the other ranks on the machine."""
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
