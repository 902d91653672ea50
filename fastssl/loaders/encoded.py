"""Gives the encoded bytes of images by index, from an image folder, a .beton file, or tar shards with index files."""

from __future__ import annotations

import mmap
import os
import re
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastssl.data_prep.beton_format import RAW
from fastssl.data_prep.decode import decode_image, read_file
from fastssl.data_prep.find import ImageFolder, find_images, number_labels
from fastssl.data_prep.manifest import check_count, name_classes, read_manifest
from fastssl.data_prep.sources import Place, read_place
from fastssl.data_prep.tars import class_number, find_tars
from fastssl.data_prep.walk import is_image_name
from fastssl.loaders.beton_file import open_beton

# What one file of a sample is in a line of DALI's index, by version: kind, start, size, and from 1.2 on the name
_INDEXED = {"v1.1": r"(\S+) (\d+) (\d+)(?: |$)", "v1.2": r"(\S+) (\d+) (\d+) (.+?)(?: (?=\S+ \d+ \d+ )|$)"}


class EncodedImages(NamedTuple):
    """n encoded images (JPEG, PNG, ... files in memory or on disk). Thread-safe."""

    read: Callable[[int], bytes]  # the encoded bytes of image i; raises BadImage when they cannot be read
    name: Callable[[int], str]  # the name of image i in messages
    label: np.ndarray  # (n,) int64, -1 where there are no classes
    class_names: list[str]
    folder: ImageFolder | None = None  # if they are its files

    def decode(self, i: int) -> np.ndarray:
        """Image i, (H, W, 3) uint8, by Pillow. Raises BadImage."""
        return decode_image(self.read(i), self.name(i))


def open_encoded(data: str | os.PathLike, class_names: Sequence[str] | None = None) -> EncodedImages:
    """The encoded images of a folder (by the rules of `find_images`), a .beton file, a .tar or a folder of .tar shards.

    Shards have the WebDataset layout (an image and a `.cls` file with the class number under one name), each with a
    DALI index file beside it (`NAME.tar`, `NAME.idx`). class_names: those of another split, to number the labels alike.
    Raises ValueError when there is nothing to read, or when images are stored as raw pixels.
    """
    data = os.fspath(data)
    if data.endswith(".tar") and os.path.isfile(data):
        return _from_shards(data, os.path.dirname(data), [data], class_names)
    if os.path.isdir(data) and (tars := find_tars(data)):
        return _from_shards(data, data, list(map(str, tars)), class_names)
    if os.path.isfile(data):
        return _from_beton(data, class_names)
    return from_folder(find_images(data, class_names))


def from_folder(folder: ImageFolder) -> EncodedImages:
    """The files of an image folder."""
    return EncodedImages(
        read=lambda i: read_file(folder.path(i), folder.path(i)),
        name=folder.path,
        label=folder.labels,
        class_names=folder.class_names,
        folder=folder,
    )


def _from_beton(data: str, class_names: Sequence[str] | None) -> EncodedImages:
    beton = open_beton(data, class_names)
    if raw := int((beton.mode == RAW).sum()):
        raise ValueError(
            f"{data} stores {raw:,} of its {len(beton):,} images as raw pixels, not as JPEGs: use --loader beton"
        )
    # Not the mapped file: one that is cut while it is read would kill the process (SIGBUS). Nor opened anew for each
    # image, as shards are: a new file of that name has its images elsewhere.
    file = os.open(data, os.O_RDONLY)
    weakref.finalize(beton, os.close, file)
    return EncodedImages(
        read=lambda i: os.pread(file, int(beton.size[i]), int(beton.pointer[i])),
        name=beton.name,
        label=beton.label,
        class_names=beton.class_names,
    )


def _from_shards(data: str, folder: str, tars: Sequence[str], class_names: Sequence[str] | None) -> EncodedImages:
    """Images of shards. A shard is opened anew for each image, because a process may not keep a thousand files open."""
    samples = [sample for tar in tars for sample in _read_index(tar)]
    if not samples:
        raise ValueError(f"the shards of {data} hold no images: make them again with 'fastssl prep shards'")
    places = [place for place, _ in samples]
    label = np.array([label for _, label in samples], dtype=np.int64)
    manifest = read_manifest(Path(folder))
    if data == folder:  # not a single shard: none may be missing
        check_count(data, manifest, len(samples))
    found_names = name_classes(Path(data), manifest, int(label.max()))
    label, found_names = number_labels(data, label, found_names, class_names)
    return EncodedImages(lambda i: read_place(places[i]), lambda i: places[i].name, label, found_names)


def _read_index(tar: str) -> list[tuple[Place, int]]:
    """The place and the label of each sample of a shard."""
    path = os.path.splitext(tar)[0] + ".idx"
    if not os.path.getsize(tar):
        raise ValueError(f"the shard {tar} is empty: make the shards again with 'fastssl prep shards'")
    if not os.path.exists(path):
        raise ValueError(f"the shard {tar} has no index {path}: make one with DALI's wds2idx or 'fastssl prep shards'")
    with open(path, encoding="utf-8") as file:
        version, _, count = file.readline().partition(" ")
        lines = file.read().splitlines()
    if version not in _INDEXED or not count.strip().isdigit() or int(count) != len(lines):
        raise ValueError(f"{path} is not a complete DALI index of version 1.1 or 1.2: make it again")
    samples = []
    with open(tar, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for number, line in enumerate(lines):
            try:
                parts = _parse(line, _INDEXED[version])
                image = min((part for part in parts if part.kind != "cls"), key=_unlikely_image)
            except (ValueError, IndexError):
                raise ValueError(f"line {number + 2} of {path} is damaged: make the index again") from None
            if max(part.start + part.size for part in parts) > len(mapped):
                raise ValueError(f"the shard {tar} is truncated: its index {path} lists more bytes; copy it again")
            name = f"{tar}/{image.name or f'{number}.{image.kind}'}"
            texts = [mapped[part.start : part.start + part.size] for part in parts if part.kind == "cls"]
            label = class_number(texts[0], f"the .cls file beside {name}") if texts else -1
            samples.append((Place(name, os.path.abspath(tar), image.start, image.size), label))
    return samples


class _Part(NamedTuple):
    """A file of a sample, as listed in an index."""

    kind: str
    start: int
    size: int
    name: str = ""  # only in version 1.2


def _parse(line: str, pattern: str) -> list[_Part]:
    found = list(re.finditer(pattern, line))
    if "".join(match[0] for match in found) != line:
        raise ValueError(line)
    return [_Part(kind, int(start), int(size), *name) for kind, start, size, *name in (m.groups() for m in found)]


def _unlikely_image(part: _Part) -> tuple[bool, int]:
    """A sort key that puts .jpg before .mask.png, and that before .json, to find the image of a sample."""
    return not is_image_name(f"x.{part.kind}"), part.kind.count(".")
