"""Where images to convert come from, a folder or tar files, and which of them are selected."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastssl.data_prep.class_list import read_classes
from fastssl.data_prep.decode import BadImage, read_file
from fastssl.data_prep.find import ImageFolder, find_images
from fastssl.data_prep.tars import Member, find_tars, read_tars


@dataclass(frozen=True)
class Selection:
    """Which images are used; they stay in the order of the source."""

    classes: str | None = None
    """Only these classes: a file with one class per line, names separated by commas, or imagenet100."""
    per_class: int | None = None
    """Only the first N images of each class."""
    count: int | None = None
    """Only N images, spread evenly over the source."""

    def __post_init__(self) -> None:
        for flag, value in (("--per-class", self.per_class), ("--count", self.count)):
            if value is not None and value < 1:
                raise ValueError(f"{flag} must be at least 1, got {value}")


class Place(NamedTuple):
    """Where the bytes of one image are; `size` is -1 for a whole file. `name` is its name in messages."""

    name: str
    path: str
    offset: int
    size: int


@dataclass(frozen=True)
class Source:
    """Image files in order. `members` says where each one is in a tar file; None for files in a folder."""

    folder: ImageFolder
    members: list[Member] | None = None

    def __len__(self) -> int:
        return len(self.folder.paths)

    def place(self, i: int) -> Place:
        """Where to read image i."""
        if self.members is None:
            return Place(self.folder.paths[i], self.folder.path(i), 0, -1)
        return Place(self.folder.paths[i], *self.members[i])

    def take(self, rows: Sequence[int] | np.ndarray, labels: np.ndarray, class_names: list[str]) -> Source:
        """Some of the images, with new labels."""
        paths = [self.folder.paths[i] for i in rows]
        members = None if self.members is None else [self.members[i] for i in rows]
        return Source(self.folder._replace(paths=paths, labels=labels, class_names=class_names), members)


def read_place(place: Place) -> bytes:
    """The bytes of one image file. Raises BadImage when the file cannot be read."""
    data = read_file(place.path, place.name, place.offset, place.size)
    if place.size >= 0 and len(data) < place.size:
        raise BadImage(place.name, "the tar file ends inside it")
    if not data:
        raise BadImage(place.name, "the file is empty")
    return data


def open_source(path: str | os.PathLike, selection: Selection) -> Source:
    """The selected images of a folder (by the rules of `find_images`), of a tar file, or of a folder of tar files.

    Raises ValueError when there are none, or when a selected class does not exist.
    """
    if not os.fspath(path):
        raise ValueError("no data set was given: name an image folder, a tar file of images, or a folder of those")
    path = Path(path)
    tars = [path] if path.is_file() else find_tars(path)
    source = Source(*read_tars(path, tars)) if tars else Source(find_images(path))
    return select(source, selection)


def select(source: Source, selection: Selection) -> Source:
    """The selected images. Classes are numbered as in a folder that has only these, in sorted order."""
    labels, names = source.folder.labels, source.folder.class_names
    rows = np.arange(len(source))
    if (selection.classes or selection.per_class) and not names:
        raise ValueError(f"{source.folder.root} has no classes: remove --classes and --per-class")
    if selection.classes:
        wanted = sorted(read_classes(selection.classes, names, source.folder.root))
        number = np.full(len(names) + 1, -1)  # new label by old label; the last entry is that of label -1
        number[[names.index(name) for name in wanted]] = np.arange(len(wanted))
        labels, names = number[labels], wanted
        rows = rows[labels >= 0]
    if selection.per_class:
        seen: Counter[int] = Counter()
        kept = []
        for i in rows:
            label = int(labels[i])
            seen[label] += 1
            if seen[label] <= selection.per_class:
                kept.append(i)
        rows = np.array(kept, dtype=np.int64)
    if selection.count and selection.count < len(rows):
        rows = rows[np.arange(selection.count) * len(rows) // selection.count]
    if not len(rows):
        raise ValueError(f"{source.folder.root} holds no images of the selected classes: select others")
    return source.take(rows, labels[rows], names)
