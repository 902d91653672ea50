"""A loader to be checked, and the order and pixels that it should give."""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fastssl.batch import ImageBatch
from fastssl.data_prep.beton_format import RAW
from fastssl.data_prep.decode import decode_image
from fastssl.loaders.beton_file import open_beton
from fastssl.loaders.encoded import open_encoded
from fastssl.loaders.make import Loader, make_loader
from fastssl.loaders.order import Order, train_shares

_BLOCK = 3  # images in a block: few, so that a small data set has many blocks
_SEED = 5


class Case(NamedTuple):
    """A loader with its data; `batch_size` is that of all ranks together, a multiple of every world size."""

    loader: str
    data: str | os.PathLike | None
    device: str = "cpu"
    batch_size: int = 8
    steps: int = 64  # batches read per epoch, at most
    shuffle: str = "full"

    def open(self, rank: int = 0, world_size: int = 1, **changes: object) -> Loader:
        """The loader of one rank."""
        options = {"batch_size": self.batch_size // world_size, "seed": _SEED, "device": self.device, "workers": 2}
        options["read_ahead"] = 2  # on a CPU too, because background threads can fail in more ways
        options |= {"shuffle": self.shuffle, "block_size": _BLOCK, "synthetic_images": 26, "synthetic_size": 24}
        return make_loader(self.loader, self.data, rank=rank, world_size=world_size, **(options | changes))

    def expected(self, world_size: int, rank: int, num_images: int, first: int, steps: int) -> list[list[int]]:
        """The indices that `order.py` gives to a rank."""
        order = Order(self.shuffle, _BLOCK)
        shares = train_shares(num_images, self.batch_size // world_size, _SEED, rank, world_size, first, order=order)
        return [share.tolist() for share in itertools.islice(shares, steps)]


def take(loader: Loader, count: int, first: int = 0) -> list[ImageBatch]:
    """`count` batches, beginning with batch `first`; the iterator is then dropped."""
    return list(itertools.islice(loader.batches(first), count))


def contents(batch: ImageBatch) -> list[tuple[int, int, int]]:
    """(index, label, checksum of height and pixels) of each image."""
    images = (batch.image(n).cpu().numpy() for n in range(batch.size))
    sums = (zlib.crc32(image.tobytes(), image.shape[0]) for image in images)
    return list(zip(batch.index.tolist(), batch.label.tolist(), sums))


def reference_pixels(data: str | os.PathLike | None) -> Callable[[int], np.ndarray] | None:
    """A function that gives image i as decoded by Pillow, (H, W, 3) uint8; None if there are no files."""
    if data is None:
        return None
    if os.path.isfile(data) and not os.fspath(data).endswith(".tar"):
        beton = open_beton(data)

        def read(i: int) -> np.ndarray:
            if beton.mode[i] == RAW:
                return np.frombuffer(beton.bytes(i), np.uint8).reshape(beton.height[i], beton.width[i], 3)
            return decode_image(bytes(beton.bytes(i)))

        return read
    encoded = open_encoded(data)
    return lambda i: decode_image(encoded.read(i), encoded.name(i))
