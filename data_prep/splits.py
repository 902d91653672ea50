"""Tells folders that are splits, or that lie around the classes, from those that are classes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable

SPLITS = ("train", "val", "valid", "validation", "test", "dev", "eval")
# train.X1, Training, imagenet1k-train-0000, cars_train, train2017; data_256 and data_large are Places365's
_SPLIT = re.compile(
    r"(?P<before>(.*?[._-])??)((?P<train>train(ing)?|data(?=_256|_large))|val|valid|validation|test|testing|dev|eval)"
    r"(?P<after>([._\d-].*)?)",
    re.IGNORECASE,
)
_IMAGES = ("images", "jpegimages")  # what data sets call the folder of images that masks lie beside


def holds_train_split(folders: Collection[str], holds_images: Callable[[str], bool]) -> bool:
    """Whether one of the `folders` is the training split called train, and not one class among others (CIFAR-100's).

    holds_images: whether a folder itself holds images, and not only folders of them.
    """
    if "train" not in folders:
        return False
    return not holds_images("train") or not any(name not in SPLITS and holds_images(name) for name in folders)


def around_classes(root: str, paths: list[str]) -> str:
    """The folders around the class folders of all `paths` below `root`, or of the training split: "", "food/train/".

    Raises ValueError for folders that would become classes though they are splits, or hold masks beside images.
    """
    folders = {path[: path.rfind("/") + 1] for path in paths}
    around = ""
    while True:
        below = [folder[len(around) :] for folder in folders if folder != around]
        tops = {folder.partition("/")[0] for folder in below}
        holders = {folder[:-1] for folder in below if folder.count("/") == 1}  # of images, not of folders alone
        if holds_train_split(tops, holders.__contains__):
            around += "train/"
            folders = {folder for folder in folders if folder.startswith(around)}
            continue
        _refuse_false_classes(os.path.join(root, around).rstrip("/"), tops)
        if around in folders or holders or len(tops) > 1:
            return around
        around += f"{tops.pop()}/"


def _refuse_false_classes(where: str, names: set[str]) -> None:
    if splits := look_like_splits(names):
        raise ValueError(
            f"{where} holds {splits[0]} and {splits[1]}, which look like splits, not classes: give {splits[0]} alone, "
            "or put the class folders of all training images into one folder train, and those of the others into val"
        )
    images = next((name for name in sorted(names) if name.lower() in _IMAGES), None)
    if images and len(names) > 1:
        other = min(names - {images})
        raise ValueError(f"{where} holds {images} and {other}, which are no classes: give {images} alone")


def look_like_splits(names: Iterable[str]) -> tuple[str, str] | None:
    """Two of the `names` that go alike up to a word for a training split, and up to one for a held-out split.

    They end with it, or most names are like them: else they are classes, as a training ship and a test tube may be.
    """
    names = sorted(names)
    found = [match for match in map(_SPLIT.fullmatch, names) if match]
    most = 2 * len(found) > len(names)
    training, held_out = {}, {}  # the first name by what stands before the word
    for match in found:
        if most or not match["after"]:
            (training if match["train"] else held_out).setdefault(match["before"].lower(), match[0])
    return next(((training[before], held_out[before]) for before in training if before in held_out), None)
