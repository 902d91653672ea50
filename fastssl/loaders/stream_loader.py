"""Images that threads decode as they are read, each once, whole and at its own size.

Threads, not processes, because images are decoded without the GIL, and sending them between processes costs more than
it gains (with Pillow two DataLoader workers took 1.3 times the CPU time of two threads at 0.85 times the rate, on
500-pixel JPEGs).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from torch import Tensor

from fastssl.batch import ImageBatch
from fastssl.data_prep.find import ImageFolder
from fastssl.loaders.bad_images import BadImages
from fastssl.loaders.order import FULL, Order, count_batches, eval_shares, train_shares
from fastssl.loaders.prefetch import Prefetcher


class Decoder(Protocol):
    """What makes batches of the images of a data set: `FileDecoder`, `BetonDecoder` or `DaliDecoder`."""

    label: np.ndarray  # (num_images,) int64, -1 for none
    class_names: list[str]
    folder: ImageFolder | None  # if they are its files
    images: BadImages  # those that cannot be decoded, and how many were
    prefetcher: Prefetcher

    def batches(self, shares: Iterator[Tensor], replace: bool) -> Iterator[ImageBatch]:
        """A batch for each (n,) tensor of indices, in its order, whichever thread finishes first.

        No share may be larger than the first. Unreadable images are replaced, or left out, as is an empty batch.
        """


class StreamLoader:
    """Loader of what `decoder` decodes; the contract is `make.Loader`, and that of `eval.images.Images`.

    The others say in which batches it trains; evaluations do without. Raises ValueError when there are fewer images
    than one global batch.
    """

    def __init__(
        self,
        decoder: Decoder,
        batch_size: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        order: Order = FULL,
    ) -> None:
        self.decoder, self.label, self.class_names = decoder, decoder.label, decoder.class_names
        self.folder, self.notices = decoder.folder, decoder.folder.notices if decoder.folder else ()
        self.num_images = len(self.label)
        self.batches_per_epoch = count_batches(self.num_images, batch_size, world_size)
        self.batch_size, self.seed, self.rank, self.world_size, self.order = batch_size, seed, rank, world_size, order

    @property
    def bad_images(self) -> list[str]:
        """The unreadable images met so far, "name: reason", in the order in which they were met."""
        return self.decoder.images.messages

    @property
    def decoded(self) -> int:
        """Images decoded so far."""
        return self.decoder.images.decoded

    def batches(self, first: int = 0) -> Iterator[ImageBatch]:
        """Batches first, first + 1, ... of this rank, of `batch_size` images each, without end."""
        shares = train_shares(
            self.num_images, self.batch_size, self.seed, self.rank, self.world_size, first, order=self.order
        )
        return self.read(shares, replace_bad=True)

    def eval_batches(
        self, batch_size: int, rank: int = 0, world_size: int = 1, limit: int | None = None
    ) -> Iterator[ImageBatch]:
        """This rank's contiguous part of all images, or of `limit` evenly spread ones, in file order."""
        return self.read(eval_shares(self.num_images, batch_size, rank, world_size, limit))

    def read(self, shares: Iterator[Tensor], *, replace_bad: bool = False) -> Iterator[ImageBatch]:
        """A batch for each (n,) tensor of indices, in its order, for evaluations with an order of their own.

        No share may be larger than the first. Unreadable images are left out (as is a batch that would be empty) or,
        with replace_bad, replaced.
        """
        return self.decoder.prefetcher.iterate(self.decoder.batches(shares, replace_bad))

    def close(self) -> None:
        """Ends all threads; iterators in use raise RuntimeError."""
        self.decoder.prefetcher.close()
