"""The index of a .beton file, for loaders: labels, sizes and where each image's bytes are. Does not need ffcv."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastssl.data_prep.beton_format import HEADER, IMAGE_FIELD, INT_FIELD, RAW, read_tables, record_sizes, truncated
from fastssl.data_prep.decode import MAX_PIXELS
from fastssl.data_prep.find import number_labels
from fastssl.data_prep.manifest import check_count, name_classes, read_manifest


@dataclass(frozen=True)
class BetonFile:
    """The index of n images, in host memory; `data` is the memory-mapped file."""

    path: str
    data: np.ndarray  # (file bytes,) uint8, mapped and read-only
    label: np.ndarray  # (n,) int64, -1 without a label field
    mode: np.ndarray  # (n,) uint8, JPEG or RAW
    height: np.ndarray  # (n,) int32
    width: np.ndarray  # (n,) int32
    pointer: np.ndarray  # (n,) int64, the image's first byte in `data`
    size: np.ndarray  # (n,) int64, its stored bytes
    class_names: list[str]  # empty without labels

    def __len__(self) -> int:
        return len(self.label)

    @property
    def pixel_bytes(self) -> np.ndarray:
        """(n,) int64: the decoded size of each image in bytes."""
        return self.height.astype(np.int64) * self.width * 3

    def name(self, i: int) -> str:
        """The name of image i in messages."""
        return f"{self.path}[{i}]"

    def bytes(self, i: int) -> memoryview:
        """Image i as it is stored: a JPEG file, or height * width * 3 bytes of RGB."""
        start = int(self.pointer[i])
        return memoryview(self.data[start : start + int(self.size[i])])


def open_beton(path: str | os.PathLike, class_names: Sequence[str] | None = None) -> BetonFile:
    """Maps a .beton file and checks its index, without reading an image.

    The class names come from the manifest `path`.json or, without one, are the numbers up to the largest label.
    class_names: those of another split (`number_labels`). Raises ValueError for a file that is missing, truncated,
    damaged, unfinished or not a .beton file.
    """
    tables = read_tables(path)
    path, data = tables.path, tables.data
    image, label = tables.column(IMAGE_FIELD, "image"), tables.column(INT_FIELD, "label")
    if image is None:
        names = ", ".join(name for name, _ in tables.fields)
        raise ValueError(f"{path} has no image field, only {names}: write the file with an RGBImageField")
    pointer, size = image["pointer"].astype(np.int64), record_sizes(tables, image["pointer"])
    label = np.full(len(image), -1, np.int64) if label is None else label.astype(np.int64)
    manifest = read_manifest(Path(path))
    if manifest and manifest["file_bytes"] != len(data):
        raise truncated(path, f"it has {len(data):,} bytes, and its manifest says {manifest['file_bytes']:,}")
    check_count(path, manifest, len(label))
    names = name_classes(Path(path), manifest, int(label.max(initial=-1)))
    label, names = number_labels(path, label, names, class_names)
    mode, height, width = image["mode"].copy(), image["height"].astype(np.int32), image["width"].astype(np.int32)
    beton = BetonFile(path, data, label, mode, height, width, pointer, size, names)
    _check_images(beton, tables.allocations_at)
    return beton


def _check_images(beton: BetonFile, table: int) -> None:
    """Raises ValueError unless every image has pixels, a known mode, and its bytes before the allocation table."""
    pixel_bytes = beton.pixel_bytes
    wrong = {
        "has no pixels": pixel_bytes == 0,
        f"has more than {MAX_PIXELS:,} pixels": pixel_bytes > MAX_PIXELS * 3,
        "is stored in an unknown mode": beton.mode > RAW,
        "has too few or too many bytes for its height and width": (beton.mode == RAW) & (beton.size != pixel_bytes),
        "lies outside the file": (beton.pointer < HEADER.itemsize) | (beton.pointer + beton.size > table),
    }
    for what, where in wrong.items():
        if where.any():
            raise ValueError(f"{beton.path} is damaged: image {int(where.argmax())} {what}; convert the images again")
