"""Where evaluated images come from: the splits of a data set, or arrays in memory; read in any order asked for."""

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
from fastssl.eval.shards import ShardImages
from fastssl.loaders.make import choose_loader, make_loader
from fastssl.loaders.prefetch import Prefetcher

HELD_OUT = ("val", "valid", "validation", "test")  # beside the training images; the first one there is taken


class Images(Protocol):
    """A set of images with labels."""

    num_images: int
    class_names: list[str]
    label: np.ndarray  # (num_images,) int64, -1 for none
    bad_images: list[str]  # "path: reason" of the unreadable images met so far

    def read(self, shares: Iterator[Tensor], *, replace_bad: bool = False) -> Iterator[ImageBatch]: ...

    def close(self) -> None: ...


class ArrayImages:
    """Images of one size that lie in memory: (n, H, W, 3) uint8 and (n,) labels."""

    bad_images: tuple[str, ...] = ()

    def __init__(self, pixels: np.ndarray, labels: Sequence[int], class_names: Sequence[str], device: torch.device):
        self.pixels, self.label = pixels, np.asarray(labels, dtype=np.int64)
        self.num_images, self.class_names = len(pixels), list(class_names)
        self._prefetcher = Prefetcher(device)

    def read(self, shares: Iterator[Tensor], *, replace_bad: bool = False) -> Iterator[ImageBatch]:
        """As `FolderLoader.read`; no image is unreadable."""

        def pack() -> Iterator[ImageBatch]:
            for share in shares:
                if len(share):
                    rows = share.numpy()
                    yield pack_images(list(self.pixels[rows]), rows, self.label[rows])

        return self._prefetcher.iterate(pack())

    def close(self) -> None:
        """Ends all threads."""
        self._prefetcher.close()


def open_images(
    path: str | os.PathLike, options: argparse.Namespace, ranks: Ranks, class_names: Sequence[str] | None = None
) -> Images:
    """The images of a folder, a .beton file or a folder of tar shards. Raises ValueError when any has no class."""
    if choose_loader("auto", path)[0] == "dali":  # shards, which DALI decodes otherwise on a GPU
        images = ShardImages(path, ranks.device, options.workers, class_names)
    else:
        images = make_loader(
            "auto", path, batch_size=1, seed=0, device=ranks.device, workers=options.workers, class_names=class_names
        )
    if not images.class_names:
        what = "class folders" if os.path.isdir(path) else "labels"
        raise ValueError(f"{os.fspath(path)} has no {what}: an evaluation needs <class>/ folders of images")
    if without := int((images.label < 0).sum()):
        raise ValueError(f"{os.fspath(path)} has {without:,} images without a class: an evaluation needs one of each")
    return images


def open_splits(options: argparse.Namespace, ranks: Ranks, held_out: Sequence[str] = HELD_OUT) -> tuple[Images, Images]:
    """The training images of DATA and the first of val, valid, validation, test beside them, numbered alike.

    DATA: a folder with folders train and val (of class folders, or of tar shards) or with train.beton and val.beton,
    or the .beton file of the training images.
    Raises ValueError for a missing split, or a class of the held-out one that train lacks.
    """
    root = Path(options.data)
    train = next((path for path in (root / "train", root / "train.beton") if path.exists()), root)
    if train == root and not root.is_file():
        what = "has no folder train" if root.is_dir() else "does not exist"
        raise ValueError(f"{root} {what}: give a folder that holds train/<class>/ and {held_out[0]}/<class>/ images")
    other = find_held_out(train, held_out)
    if other is None:
        kind = "file" if train.is_file() else "folder"
        names = " or ".join(name + train.suffix for name in held_out)
        raise ValueError(f"{train.parent} has no {kind} {names} beside {train.name}: evaluations ask its images")
    found = open_images(train, options, ranks)
    return found, open_images(other, options, ranks, found.class_names)


def find_held_out(data: Path, held_out: Sequence[str] = HELD_OUT) -> Path | None:
    """The held-out split beside the training images: val/ beside train/, or val.beton beside a .beton file."""
    if data.is_file():
        beside = [data.with_name(name + data.suffix) for name in held_out]
        return next((path for path in beside if path.is_file() and path != data), None)
    data = data.absolute()  # "." may be train
    train = data if data.name == "train" else data / "train"
    beside = [train.parent / name for name in held_out]
    return next((path for path in beside if train.is_dir() and path.is_dir()), None)


def rank_batches(num_images: int, batch_size: int, ranks: Ranks) -> list[Tensor]:
    """This rank's part of all images in order, as whole batches (n,) of indices, the last of all smaller.

    Whole, so that what a batch is does not depend on how many ranks there are.
    """
    batches = torch.arange(num_images).split(batch_size)
    first, end = (len(batches) * r // ranks.world_size for r in (ranks.rank, ranks.rank + 1))
    return list(batches[first:end])
