"""Lists the image files of a folder with the class of each."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastssl.data_prep.splits import around_classes, holds_train_split
from fastssl.data_prep.walk import explain_none, is_image_name, unread_notice, walk_images
from fastssl.plural import counted

ANNOTATIONS = "val_annotations.txt"  # Tiny ImageNet's: the class of each file of val/images


class ImageFolder(NamedTuple):
    """A list of image files, in the same order on every machine."""

    root: str  # the folder that contains all of them
    paths: list[str]  # relative to root, sorted by their parts between "/"
    labels: np.ndarray  # (n,) int64, -1 everywhere when there are no classes
    class_names: list[str]  # sorted; empty for a flat folder
    notices: Sequence[str] = ()  # sentences on what one might not expect

    def path(self, i: int) -> str:
        """The full path of file i."""
        return os.path.join(self.root, self.paths[i])


def find_images(root: str | os.PathLike, class_names: Sequence[str] | None = None) -> ImageFolder:
    """Lists the images of `root/train/<class>/*`, of `root/<class>/*`, or of a flat folder.

    Folders are searched to any depth and links are followed; an image's class is its first folder below the base,
    where a folder around all class folders does not count. A base that directly holds images is flat: it has no
    classes, though images in its folders count too. Files are chosen by extension; hidden ones (`.name`) are ignored.
    Beside Tiny ImageNet's `val_annotations.txt` an image's class is what that says.
    `class_names`: those of another split, to number the labels alike. Raises ValueError when there is no folder, no
    image, or a class that is not in `class_names`, and when the folders are splits that would be taken for classes.
    """
    root = os.fspath(root)
    if not os.path.isdir(root):
        what = "is a file, not a folder" if os.path.exists(root) else "does not exist"
        raise ValueError(f"{root} {what}: give a folder that holds images, <class>/ folders or train/<class>/ folders")
    try:
        base = os.path.join(root, "train") if has_train_split(root) else root
        unread: Counter[str] = Counter()
        paths = sorted(walk_images(base, unread), key=by_parts)
    except OSError as error:
        raise ValueError(f"cannot read the folder {error.filename}: {error.strerror}") from error
    if not paths:
        raise ValueError(explain_none(base))
    if around := around_classes(base, paths):
        outside, split, _ = f"/{around}".partition("/train/")  # the class folders may lie deeper than train/
        if split:
            train = os.path.join(base, outside[1:], "train")
            raise ValueError(f"{root} has its training images in {train}: give {os.path.dirname(train)}")
        base = os.path.join(base, around[:-1])
        paths = [path.removeprefix(around) for path in paths]
    found = label_by_folder(base, paths, class_names, read_annotations(base, paths))
    return found._replace(notices=(*found.notices, *unread_notice(unread)))


def by_parts(path: str) -> str:
    """A key that sorts paths by their parts between "/": no name holds the character that stands for it here."""
    return path.replace("/", "\0")


def label_by_folder(
    base: str, paths: list[str], class_names: Sequence[str] | None = None, classes: Sequence[str] = ()
) -> ImageFolder:
    """The files `paths` (sorted) below `base`, labelled by their first folders; unlabelled if any of them has none.

    classes: the class of each file, where it is not its first folder.
    """
    tops = classes or [path.split("/", 1)[0] if "/" in path else None for path in paths]
    if None in tops:
        return ImageFolder(base, paths, np.full(len(paths), -1, dtype=np.int64), [])
    names = sorted(set(tops))
    number = {name: i for i, name in enumerate(names)}
    labels = np.array([number[top] for top in tops], dtype=np.int64)
    notices = [] if classes else deep_notice(base, paths, names)
    return ImageFolder(base, paths, *number_labels(base, labels, names, class_names), notices)


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


def read_annotations(base: str, paths: list[str]) -> list[str]:
    """The class of each file by the list that Tiny ImageNet has instead of class folders; [] without that list.

    Raises ValueError when it lacks a file.
    """
    listed = os.path.join(base, ANNOTATIONS)
    if not os.path.isfile(listed):
        return []
    with open(listed, encoding="utf-8", errors="surrogateescape") as file:  # as names of files are read
        class_of = dict(line.rstrip("\n").split("\t")[:2] for line in file if "\t" in line)
    names = [os.path.basename(path) for path in paths]
    if missing := [name for name in names if name not in class_of]:
        raise ValueError(f"{listed} does not say the class of {missing[0]}: unpack Tiny ImageNet's archive again")
    return [class_of[name] for name in names]


def deep_notice(base: str, paths: list[str], names: list[str]) -> list[str]:
    """A sentence, if all images lie in more folders below the class folders `names`, as Places365's do."""
    folders = {path[: path.rfind("/")] for path in paths}
    if len(names) == 1 or len(folders) <= len(names) or not all("/" in folder for folder in folders):
        return []
    classes, below = counted(len(names), "folder"), counted(len(folders), "folder")
    return [f"the classes are the {classes} of {base}, such as {names[0]}, not the {below} below them that hold images"]


def has_train_split(root: str) -> bool:
    """Whether root/train is the training split, by the rule of `holds_train_split`."""
    folders = [n for n in os.listdir(root) if not n.startswith(".") and os.path.isdir(os.path.join(root, n))]
    return holds_train_split(folders, lambda name: any(map(is_image_name, os.listdir(os.path.join(root, name)))))
