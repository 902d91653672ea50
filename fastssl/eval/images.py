"""Where evaluated images come from: the splits of a data set, or arrays in memory. They can be read in any order."""

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
from fastssl.loaders.choose import choose_loader
from fastssl.loaders.encoded import open_encoded
from fastssl.loaders.file_decode import FileDecoder
from fastssl.loaders.make import make_loader
from fastssl.loaders.order import epoch_order
from fastssl.loaders.prefetch import Prefetcher
from fastssl.loaders.stream_loader import StreamLoader
from fastssl.plural import counted
from fastssl.same_on_ranks import check_images

HELD_OUT = ("val", "valid", "validation", "test")  # names of the held-out split; the first that exists is taken


class Images(Protocol):
    """A set of labelled images: what the evaluations read from, whatever the storage."""

    num_images: int
    class_names: list[str]
    label: np.ndarray  # (num_images,) int64, -1 for none
    bad_images: list[str]  # "path: reason" of the unreadable images met so far
    notices: Sequence[str]  # sentences on what one might not expect of the files

    def read(self, shares: Iterator[Tensor], *, replace_bad: bool = False) -> Iterator[ImageBatch]: ...

    def close(self) -> None: ...


class ArrayImages:
    """Images in memory, all of one size: (n, H, W, 3) uint8 and (n,) labels."""

    bad_images: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()

    def __init__(self, pixels: np.ndarray, labels: Sequence[int], class_names: Sequence[str], device: torch.device):
        self.pixels, self.label = pixels, np.asarray(labels, dtype=np.int64)
        self.num_images, self.class_names = len(pixels), list(class_names)
        self._prefetcher = Prefetcher(device)

    def read(self, shares: Iterator[Tensor], *, replace_bad: bool = False) -> Iterator[ImageBatch]:
        """As `StreamLoader.read`; every image can be read."""

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
    """The images of a folder, a .beton file or a folder of tar shards.

    Call on all ranks. Raises ValueError when any image has no class, or the ranks see different ones.
    """
    if choose_loader("auto", path)[0] == "dali":  # shards: on a GPU, DALI's decoder gives other pixels than Pillow
        images = StreamLoader(FileDecoder(open_encoded(path, class_names), ranks.device, options.workers))
    else:
        images = make_loader(
            "auto", path, batch_size=1, seed=0, device=ranks.device, workers=options.workers, class_names=class_names
        )
    if not images.class_names:
        what = "class folders" if os.path.isdir(path) else "labels"
        raise ValueError(f"{os.fspath(path)} has no {what}: evaluations need images in <class>/ folders")
    if without := int((images.label < 0).sum()):
        count = counted(without, "image")
        raise ValueError(f"{os.fspath(path)} has {count} without a class: evaluations need a class for every image")
    check_images(images, os.path.basename(path), ranks)
    return images


def open_splits(options: argparse.Namespace, ranks: Ranks, held_out: Sequence[str] = HELD_OUT) -> tuple[Images, Images]:
    """(training images, held-out images) of DATA, their classes numbered alike.

    DATA: a folder with folders train and val (of class folders, or of tar shards) or with train.beton and val.beton,
    or the .beton file of the training images. held_out: what val may be called, in order of preference.
    Raises ValueError for a missing split, or a class of the held-out split that train lacks.
    """
    root = Path(options.data)
    train = next((path for path in (root / "train", root / "train.beton") if path.exists()), root)
    if train == root and not root.is_file():
        what = "has no folder train" if root.is_dir() else "does not exist"
        raise ValueError(f"{root} {what}: give a folder with images in train/<class>/ and {held_out[0]}/<class>/")
    other = find_held_out(train, held_out)
    if other is None:
        kind = "file" if train.is_file() else "folder"
        names = " or ".join(name + train.suffix for name in held_out)
        raise ValueError(f"{train.parent} has no {kind} {names} beside {train.name}: put the held-out images there")
    found = open_images(train, options, ranks)
    if len(found.class_names) == 1:
        raise ValueError(
            f"{train} has but one class, {found.class_names[0]}: an accuracy needs several <class>/ folders"
        )
    return found, open_images(other, options, ranks, found.class_names)


def find_held_out(data: Path, held_out: Sequence[str] = HELD_OUT) -> Path | None:
    """The held-out split beside the training images: val/ beside train/, or val.beton beside a .beton file."""
    if data.is_file():
        beside = [data.with_name(name + data.suffix) for name in held_out]
        return next((path for path in beside if path.is_file() and path != data), None)
    data = data.absolute()  # so that "." has a name, which may be train
    train = data if data.name == "train" else data / "train"
    beside = [train.parent / name for name in held_out]
    return next((path for path in beside if train.is_dir() and path.is_dir()), None)


def rank_batches(num_images: int, batch_size: int, ranks: Ranks) -> list[Tensor]:
    """This rank's part of all images, in order, as batches of indices (n,).

    All images are cut into batches first, so that a batch holds the same images whatever the number of ranks.
    """
    batches = torch.arange(num_images).split(batch_size)
    first, end = (len(batches) * r // ranks.world_size for r in (ranks.rank, ranks.rank + 1))
    return list(batches[first:end])


def shuffled_batches(num_images: int, batch_size: int, ranks: Ranks, seed: int) -> list[Tensor]:
    """`rank_batches` of the images in a random order, which depends on the seed and not on the number of ranks."""
    order = epoch_order(num_images, seed, 0)
    return [order[batch] for batch in rank_batches(num_images, batch_size, ranks)]
