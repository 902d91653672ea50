"""Where evaluated images come from: the splits of a folder, or arrays in memory; read in any order asked for."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastssl.batch import ImageBatch, pack_images
from fastssl.distributed import Ranks
from fastssl.loaders.make import make_loader
from fastssl.loaders.prefetch import Prefetcher

HELD_OUT = ("val", "valid", "validation", "test")  # beside the training images; the first one there is taken


class Images(Protocol):
    """A set of images with labels."""

    num_images: int
    class_names: list[str]
    bad_images: list[str]  # "path: reason" of the unreadable images met so far

    def read(self, shares: Iterator[Tensor], *, replace_bad: bool = False) -> Iterator[ImageBatch]: ...

    def close(self) -> None: ...


class ArrayImages:
    """Images of one size that lie in memory: (n, H, W, 3) uint8 and (n,) labels."""

    bad_images: tuple[str, ...] = ()

    def __init__(self, pixels: np.ndarray, labels: Sequence[int], class_names: Sequence[str], device: torch.device):
        self.pixels, self.labels = pixels, np.asarray(labels, dtype=np.int64)
        self.num_images, self.class_names = len(pixels), list(class_names)
        self._prefetcher = Prefetcher(device)

    def read(self, shares: Iterator[Tensor], *, replace_bad: bool = False) -> Iterator[ImageBatch]:
        """As `FolderLoader.read`; no image is unreadable."""

        def pack() -> Iterator[ImageBatch]:
            for share in shares:
                if len(share):
                    rows = share.numpy()
                    yield pack_images(list(self.pixels[rows]), rows, self.labels[rows])

        return self._prefetcher.iterate(pack())

    def close(self) -> None:
        """Ends all threads."""
        self._prefetcher.close()


class Subset:
    """Some images of a set, by index (n,) int64, in that order."""

    def __init__(self, images: Images, chosen: Tensor, class_names: Sequence[str]) -> None:
        self.images, self.chosen = images, chosen
        self.num_images, self.class_names, self.bad_images = len(chosen), list(class_names), images.bad_images

    def read(self, shares: Iterator[Tensor], *, replace_bad: bool = False) -> Iterator[ImageBatch]:
        """As `FolderLoader.read`; `index` is that of the whole set."""
        return self.images.read((self.chosen[share] for share in shares), replace_bad=replace_bad)

    def close(self) -> None:
        """Ends all threads."""
        self.images.close()


def open_folder(
    path: str | os.PathLike, options: argparse.Namespace, ranks: Ranks, class_names: Sequence[str] | None = None
) -> Images:
    """The images below a folder. Raises ValueError when they cannot be read in any order, or have no classes."""
    images = make_loader(
        "auto", path, batch_size=1, seed=0, device=ranks.device, workers=options.workers, class_names=class_names
    )
    if not hasattr(images, "read"):
        raise ValueError(f"{os.fspath(path)}: evaluations read folders of image files, not {images.name}")
    if not images.class_names:
        raise ValueError(f"{os.fspath(path)} has no class folders: an evaluation needs <class>/ folders of images")
    return images


def open_splits(options: argparse.Namespace, ranks: Ranks, held_out: Sequence[str] = HELD_OUT) -> tuple[Images, Images]:
    """The images of DATA/train and of the first of DATA/val, valid, validation, test, with the same class numbers.

    Raises ValueError for a missing split, or a class of the held-out one that train lacks.
    """
    root = Path(options.data)
    if not (root / "train").is_dir():
        what = "has no folder train" if root.is_dir() else "does not exist"
        raise ValueError(f"{root} {what}: give a folder that holds train/<class>/ and {held_out[0]}/<class>/ images")
    other = next((root / name for name in held_out if (root / name).is_dir()), None)
    if other is None:
        raise ValueError(f"{root} has no folder {' or '.join(held_out)} beside train: evaluations ask its images")
    train = open_folder(root / "train", options, ranks)
    return train, open_folder(other, options, ranks, train.class_names)


def rank_batches(num_images: int, batch_size: int, ranks: Ranks) -> list[Tensor]:
    """This rank's part of all images in order, as whole batches (n,) of indices, the last of all smaller.

    Whole, so that what a batch is does not depend on how many ranks there are.
    """
    batches = torch.arange(num_images).split(batch_size)
    first, end = (len(batches) * r // ranks.world_size for r in (ranks.rank, ranks.rank + 1))
    return list(batches[first:end])
