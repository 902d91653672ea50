"""Finds the image files of a folder, and the class of each."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fastssl.plural import counted

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SPLITS = ("train", "val", "valid", "validation", "test", "dev", "eval")
_TRAIN = re.compile(r"(.*[._-])?train(ing)?([._-].*)?", re.IGNORECASE)  # train.X1, Training, imagenet1k-train-0000
_HELD_OUT = re.compile(r"(.*[._-])?(val|valid|validation|test|testing|dev|eval)([._-].*)?", re.IGNORECASE)


class ImageFolder(NamedTuple):
    """A list of image files, in the same order on every machine."""

    root: str  # the folder that contains all of them
    paths: list[str]  # relative to root, sorted by their parts between "/"
    labels: np.ndarray  # (n,) int64, -1 everywhere when there are no classes
    class_names: list[str]  # sorted; empty for a flat folder

    def path(self, i: int) -> str:
        """The full path of file i."""
        return os.path.join(self.root, self.paths[i])


def find_images(root: str | os.PathLike, class_names: Sequence[str] | None = None) -> ImageFolder:
    """Lists the images of `root/train/<class>/*`, of `root/<class>/*`, or of a flat folder.

    Folders are searched to any depth and links are followed; an image's class is its first folder below the base,
    where a folder around all class folders does not count. A base that directly holds images is flat: it has no
    classes, though images in its folders count too. Files are chosen by extension; hidden ones (`.name`) are ignored.
    `class_names`: those of another split, to number the labels alike. Raises ValueError when there is no folder, no
    image, or a class that is not in `class_names`, and when the folders are splits that would be taken for classes.
    """
    root = os.fspath(root)
    if not os.path.isdir(root):
        what = "is a file, not a folder" if os.path.exists(root) else "does not exist"
        raise ValueError(f"{root} {what}: give a folder that holds images, <class>/ folders or train/<class>/ folders")
    try:
        base = os.path.join(root, "train") if has_train_split(root) else root
        paths = sorted(walk_images(base), key=by_parts)
    except OSError as error:
        raise ValueError(f"cannot read the folder {error.filename}: {error.strerror}") from error
    if not paths:
        held = _inventory(base)
        mend = "give a folder that holds images, <class>/ folders or train/<class>/ folders, with files named "
        mend += " ".join(EXTENSIONS)
        if any(name.endswith(".tar") for _, _, names in os.walk(base) for name in names):
            mend = "tar shards are read by --loader dali and converted by fastssl prep beton"
        raise ValueError(f"{base} holds no images ({held}): {mend}")
    if base == root and (around := around_classes(root, paths)):
        base = os.path.join(root, around[:-1])
        if os.path.basename(base) == "train":
            raise ValueError(f"{root} has its training images in {base}: give {os.path.dirname(base)}")
        paths = [path.removeprefix(around) for path in paths]
    return label_by_folder(base, paths, class_names)


def by_parts(path: str) -> str:
    """A key that sorts paths by their parts between "/": no name holds the character that stands for it here."""
    return path.replace("/", "\0")


def around_classes(root: str, paths: list[str]) -> str:
    """The folders around the class folders of all `paths` below `root`, or of the training split: "", "food/train/".

    Raises ValueError for folders that look like splits by other names than `train`, and would become classes.
    """
    folders = {path[: path.rfind("/") + 1] for path in paths}
    around = ""
    while True:
        below = [folder[len(around) :] for folder in folders if folder != around]
        tops = {folder.partition("/")[0] for folder in below}
        holders = {folder[:-1] for folder in below if folder.count("/") == 1}  # of images, not of folders alone
        if "train" in tops and ("train" not in holders or holders.issubset(SPLITS)):  # the rule of `has_train_split`
            return f"{around}train/"
        if splits := look_like_splits(tops - holders):
            where = os.path.join(root, around).rstrip("/")
            raise ValueError(
                f"{where} holds {splits[0]} and {splits[1]}, which look like splits, not classes: put the class "
                "folders of all training images into one folder train, and those of the others into val"
            )
        if around in folders or holders or len(tops) > 1:
            return around
        around += f"{tops.pop()}/"


def look_like_splits(names: Iterable[str]) -> tuple[str, str] | None:
    """A name like that of a training split, and one like that of a held-out split; None if either is missing."""
    names = sorted(names)
    train, held_out = (next(filter(kind.fullmatch, names), None) for kind in (_TRAIN, _HELD_OUT))
    return (train, held_out) if train and held_out else None


def label_by_folder(base: str, paths: list[str], class_names: Sequence[str] | None = None) -> ImageFolder:
    """The files `paths` (sorted) below `base`, labelled by their first folders; unlabelled if any of them has none."""
    tops = [path.split("/", 1)[0] if "/" in path else None for path in paths]
    if None in tops:
        return ImageFolder(base, paths, np.full(len(paths), -1, dtype=np.int64), [])
    names = sorted(set(tops))
    number = {name: i for i, name in enumerate(names)}
    labels = np.array([number[top] for top in tops], dtype=np.int64)
    return ImageFolder(base, paths, *number_labels(base, labels, names, class_names))


def number_labels(
    data: str, label: np.ndarray, names: list[str], class_names: Sequence[str] | None
) -> tuple[np.ndarray, list[str]]:
    """Labels (n,) of the classes `names` renumbered by the list `class_names` of another split, and that list.

    Without `class_names` they stay as they are. Raises ValueError, with the name `data`, for a class not on the list.
    """
    label = np.maximum(label, -1)  # every negative label means: no class
    if not class_names or not names:
        return label, names
    number = {name: i for i, name in enumerate(class_names)}
    if unknown := [name for name in names if name not in number]:
        known = counted(len(number), "class", "classes")
        raise ValueError(
            f"{data} has a class {unknown[0]!r} that is not among the {known} of the other split: sort its images into "
            "classes of the same names"
        )
    renumber = np.array([number[name] for name in names], np.int64)
    return np.where(label < 0, -1, renumber[label]), list(class_names)


def has_train_split(root: str) -> bool:
    """Whether root/train is the training split, and not one class among others (as in CIFAR-100)."""
    if not os.path.isdir(os.path.join(root, "train")):
        return False
    if not _holds_images(os.path.join(root, "train")):
        return True
    others = [os.path.join(root, name) for name in os.listdir(root) if name not in SPLITS]
    return not any(os.path.isdir(path) and _holds_images(path) for path in others)


def _holds_images(folder: str) -> bool:
    return any(map(is_image_name, os.listdir(folder)))


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return not name.startswith(".") and name.lower().endswith(EXTENSIONS)


def walk_images(folder: str, prefix: str = "", above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """Relative paths of the images in a folder and below it, without following links back to a folder above."""
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in above:
        return
    above = above | {(status.st_dev, status.st_ino)}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                yield from walk_images(entry.path, f"{prefix}{entry.name}/", above)
            elif is_image_name(entry.name):
                yield prefix + entry.name


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself is treated as an unreadable file
        return False


def _inventory(folder: str) -> str:
    """What a folder without images holds, in a few words."""
    files, folders = Counter(), 0
    for _, folder_names, file_names in os.walk(folder):
        folders += len(folder_names)
        files.update((os.path.splitext(name)[1] or "no-extension") + " file" for name in file_names)
    kinds = files.most_common(3) + ([("folder", folders)] if folders else [])
    found = ", ".join(counted(number, kind) for kind, number in kinds)
    return f"only {found}" if found else "it is empty"
