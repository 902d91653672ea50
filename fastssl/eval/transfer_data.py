"""The data sets of the transfer protocol, read from files that are already on disk: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import torch
import torchvision.datasets as tvd
from torch import Tensor

from fastssl.data_prep.find import find_images, label_by_folder
from fastssl.distributed import Ranks
from fastssl.eval.images import HELD_OUT, ArrayImages, Images, open_splits
from fastssl.eval.session import Session
from fastssl.loaders.encoded import from_folder
from fastssl.loaders.file_decode import FileDecoder
from fastssl.loaders.order import epoch_order
from fastssl.loaders.stream_loader import StreamLoader

DATASETS = ("cifar10", "cifar100", "imagenet", "caltech101")
_CIFAR = {"cifar10": (tvd.CIFAR10, "cifar-10-batches-py"), "cifar100": (tvd.CIFAR100, "cifar-100-python")}
_CALTECH = Path("caltech101", "101_ObjectCategories")
_BACKGROUND = "BACKGROUND_Google"  # not a class of objects
CALTECH_PER_CLASS = 30  # training images: the usual split


def open_transfer_data(session: Session) -> tuple[Images, Images]:
    """(train, test) of --dataset from DATA: torchvision's files, or folders as for `open_splits`, test before val.

    Raises ValueError when neither is there, or torchvision's files are damaged.
    """
    o, ranks = session.options, session.ranks
    root = Path(o.data)
    if o.dataset in _CIFAR and (root / _CIFAR[o.dataset][1]).is_dir():
        return open_cifar(root, o.dataset, ranks)
    if o.dataset == "caltech101" and not (root / "train").is_dir():
        for folder in (root / _CALTECH, root / _CALTECH.name, root):
            if folder.name == _CALTECH.name and folder.is_dir():
                return split_caltech(session, folder)
    if not (root / "train").is_dir() and not (root / "train.beton").is_file():
        known = f"{_CIFAR[o.dataset][1]}/" if o.dataset in _CIFAR else f"{_CALTECH}/"
        folders = "train/<class>/ and test/<class>/ folders" + ("" if o.dataset == "imagenet" else f" or {known}")
        raise ValueError(f"{root} does not hold {o.dataset}: give a folder with {folders}")
    return open_splits(o, ranks, HELD_OUT if o.dataset == "imagenet" else ("test", *HELD_OUT[:-1]))


def open_cifar(root: Path, dataset: str, ranks: Ranks) -> tuple[Images, Images]:
    """(train, test) of torchvision's CIFAR, which checks its files before it reads them."""
    kind, folder = _CIFAR[dataset]
    try:
        parts = [kind(str(root), train=train, download=False) for train in (True, False)]
    except RuntimeError as error:
        raise ValueError(f"{root / folder} is incomplete or damaged: unpack the archive again") from error
    train, test = (ArrayImages(part.data, part.targets, part.classes, ranks.device) for part in parts)
    return train, test


def split_caltech(session: Session, folder: Path) -> tuple[Images, Images]:
    """(train, test) of the whole Caltech-101, split by --seed: 30 images of each class to train on, the others to test.

    Raises ValueError when there are no class folders.
    """
    listed = find_images(folder)
    objects = label_by_folder(listed.root, [path for path in listed.paths if not path.startswith(f"{_BACKGROUND}/")])
    names, o = objects.class_names, session.options
    if not names:
        raise ValueError(f"{folder} has no class folders: unpack Caltech-101's archive again")

    def open_rows(rows: Tensor) -> StreamLoader:  # two loaders: an unreadable image is replaced by one of its own split
        part = label_by_folder(objects.root, [objects.paths[i] for i in rows.tolist()], names)
        return StreamLoader(FileDecoder(from_folder(part), session.ranks.device, o.workers))

    train, test = caltech_rows(torch.from_numpy(objects.labels), len(names), o.seed)
    return open_rows(train), open_rows(test)


def caltech_rows(labels: Tensor, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """(rows to train on, rows to test on), both ascending; at least one image of each class is kept for the test."""
    train, test = [], []
    for c in range(num_classes):
        rows = (labels == c).nonzero()[:, 0]
        rows = rows[epoch_order(len(rows), seed, c)]
        first = min(CALTECH_PER_CLASS, len(rows) - 1)
        train.append(rows[:first])
        test.append(rows[first:])
    return torch.cat(train).sort().values, torch.cat(test).sort().values
