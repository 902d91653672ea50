"""Images from a folder of files, each decoded once, whole and at its own size, by threads.

Threads, not processes, because images are decoded without the GIL, and sending them between processes costs more than
it gains (with Pillow two DataLoader workers took 1.3 times the CPU time of two threads at 0.85 times the rate, on
500-pixel JPEGs).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fastssl.batch import ImageBatch
from fastssl.data_prep.find import ImageFolder, find_images
from fastssl.limits import usable_cores
from fastssl.loaders.encoded import from_folder
from fastssl.loaders.file_decode import FileDecoder
from fastssl.loaders.memory import folder_pixel_bytes
from fastssl.loaders.order import FULL, Order, count_batches, eval_shares, train_shares
from fastssl.loaders.prefetch import Prefetcher


class FolderLoader:
    """Loader of `root/train/<class>/*`, `root/<class>/*`, a flat folder or a listing; the contract is `make.Loader`.

    on_bad_image: "skip" replaces an unreadable image by the next readable one in file order (its pixels and label, but
    the index, and so the augmentation, of the unreadable one) and lists it in `bad_images`; "error" raises ValueError.
    Evaluations leave unreadable images out instead. read_ahead: see `Prefetcher`.
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
        self.class_names, self.notices = self.folder.class_names, self.folder.notices
        self.batches_per_epoch = count_batches(self.num_images, batch_size, world_size)
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.workers = workers or default_workers()
        self.order = order
        self._prefetcher = Prefetcher(device, read_ahead)
        self._files = FileDecoder(from_folder(self.folder), on_bad_image, self.workers, self._prefetcher)

    @property
    def bad_images(self) -> list[str]:
        """The unreadable images met so far, "path: reason", in the order in which they were met."""
        return self._files.images.messages

    @property
    def decoded(self) -> int:
        """Images decoded so far."""
        return self._files.images.decoded

    def pixel_bytes(self, chosen: Iterable[int]) -> int:
        """The decoded size of the chosen images in bytes, from their headers."""
        return folder_pixel_bytes(self.folder, chosen, self.workers)

    def batches(self, first: int = 0) -> Iterator[ImageBatch]:
        """Batches first, first + 1, ... of this rank, of `batch_size` images each, without end."""
        shares = train_shares(
            self.num_images, self.batch_size, self.seed, self.rank, self.world_size, first, order=self.order
        )
        return self._prefetcher.iterate(self._files.batches(shares, replace=True))

    def eval_batches(
        self, batch_size: int, rank: int = 0, world_size: int = 1, limit: int | None = None
    ) -> Iterator[ImageBatch]:
        """This rank's contiguous part of all images, or of `limit` evenly spread ones, in file order."""
        return self.read(eval_shares(self.num_images, batch_size, rank, world_size, limit))

    def read(self, shares: Iterator[Tensor], *, replace_bad: bool = False) -> Iterator[ImageBatch]:
        """A batch for each (n,) tensor of indices, in its order, for evaluations with an order of their own.

        Unreadable images are left out (as is a batch that would be empty) or, with replace_bad, replaced.
        """
        return self._prefetcher.iterate(self._files.batches(shares, replace_bad))

    def close(self) -> None:
        """Ends all threads; iterators in use raise RuntimeError."""
        self._prefetcher.close()


def default_workers() -> int:
    """This process's share of the cores: those it may use, divided by the number of ranks on the machine."""
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
