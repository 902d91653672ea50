"""Where images come from: a folder, or tar files; which of them are wanted, in the order of the folder loader."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastssl.data_prep.class_list import read_classes
from fastssl.data_prep.images import BadImage, ImageFolder, find_images, read_file
from fastssl.data_prep.tars import Member, find_tars, read_tars


@dataclass(frozen=True)
class Selection:
    """Which images are taken; their order stays that of the source."""

    classes: str | None = None
    """Only these classes: a file with a name a line, names with commas between them, or imagenet100."""
    per_class: int | None = None
    """The first so many images of each class."""
    count: int | None = None
    """So many images, evenly spread over the source."""

    def __post_init__(self) -> None:
        for flag, value in (("--per-class", self.per_class), ("--count", self.count)):
            if value is not None and value < 1:
                raise ValueError(f"{flag} must be at least 1, got {value}")


class Place(NamedTuple):
    """Where the bytes of one image lie; `size` is -1 for a whole file. `name` is what people call it."""

    name: str
    path: str
    offset: int
    size: int


@dataclass(frozen=True)
class Source:
    """Image files in order. `members` are where each image lies in a tar, None for files in a folder."""

    folder: ImageFolder
    members: list[Member] | None = None

    def __len__(self) -> int:
        return len(self.folder.paths)

    def place(self, i: int) -> Place:
        """Where image i is to be read."""
        if self.members is None:
            return Place(self.folder.paths[i], self.folder.path(i), 0, -1)
        return Place(self.folder.paths[i], *self.members[i])

    def take(self, rows: Sequence[int] | np.ndarray, labels: np.ndarray, class_names: list[str]) -> Source:
        """Some of the images, with new labels."""
        paths = [self.folder.paths[i] for i in rows]
        members = None if self.members is None else [self.members[i] for i in rows]
        return Source(ImageFolder(self.folder.root, paths, labels, class_names), members)


def read_place(place: Place) -> bytes:
    """The bytes of one image file. Raises BadImage when the file cannot be read."""
    data = read_file(place.path, place.name, place.offset, place.size)
    if place.size >= 0 and len(data) < place.size:
        raise BadImage(place.name, "the tar file ends within it")
    if not data:
        raise BadImage(place.name, "the file is empty")
    return data


def open_source(path: str | os.PathLike, selection: Selection) -> Source:
    """The wanted images of a folder (the rules of `find_images`), of a tar file, or of a folder of tar files.

    Raises ValueError when there are none, or when a class is asked for that does not exist.
    """
    if not os.fspath(path):
        raise ValueError("no data set was given: name an image folder, a tar file of images, or a folder of such")
    path = Path(path)
    tars = [path] if path.is_file() else find_tars(path)
    source = Source(*read_tars(path, tars)) if tars else Source(find_images(path))
    return select(source, selection)


def select(source: Source, selection: Selection) -> Source:
    """The selected images. Classes are numbered anew, in sorted order, as a folder with only these would have them."""
    labels, names = source.folder.labels, source.folder.class_names
    rows = np.arange(len(source))
    if (selection.classes or selection.per_class) and not names:
        raise ValueError(f"{source.folder.root} has no classes to choose from: leave out --classes and --per-class")
    if selection.classes:
        wanted = sorted(read_classes(selection.classes, names, source.folder.root))
        number = np.full(len(names) + 1, -1)
        number[[names.index(name) for name in wanted]] = np.arange(len(wanted))
        labels, names = number[labels], wanted
        rows = rows[labels >= 0]
    if selection.per_class:
        seen = dict.fromkeys(range(len(names)), 0)
        kept = []
        for i in rows:
            seen[int(labels[i])] += 1
            if seen[int(labels[i])] <= selection.per_class:
                kept.append(i)
        rows = np.array(kept, dtype=np.int64)
    if selection.count and selection.count < len(rows):
        rows = rows[np.arange(selection.count) * len(rows) // selection.count]
    if not len(rows):
        raise ValueError(f"{source.folder.root} holds no images of the classes asked for")
    return source.take(rows, labels[rows], names)
