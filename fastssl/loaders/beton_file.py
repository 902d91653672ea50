"""The index of an FFCV .beton file: where each image's bytes lie. Needs numpy only, not ffcv.

The layout (FFCV 1.0, little endian): header, one descriptor a field, one row of metadata a sample, pages of data and,
last, the allocation table. Metadata tells where a sample's bytes begin, only the table how many they are. FFCV reads
past a table that is cut short and shows wrong pixels; here every pointer must be found in it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

import numpy as np

VERSION = 2
JPEG, RAW = 0, 1  # values of `mode`
HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page_size", "<u4"), ("samples", "<u8"), ("table", "<u8")], align=True
)
DESCRIPTOR = np.dtype([("type", "u1"), ("name", "S16"), ("arguments", "V1024")])
ALLOCATION = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("size", "<u8")])
INT_FIELD, IMAGE_FIELD = 1, 2
_SPAN = np.dtype([("pointer", "<u8"), ("size", "<u8")])
FIELD_METADATA = {  # by a descriptor's type
    0: np.dtype("<f8"),
    INT_FIELD: np.dtype("<i8"),
    IMAGE_FIELD: np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")]),
    3: _SPAN,  # bytes
    4: np.dtype("<u8"),  # array
    5: _SPAN,  # JSON
    6: np.dtype("<u8"),  # tensor
}


@dataclass(frozen=True)
class BetonFile:
    """n images in a file that stays on disk; arrays are host memory, `data` is the mapped file."""

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

    def bytes(self, i: int) -> memoryview:
        """Image i as it is stored: a JPEG file, or height * width * 3 bytes of RGB."""
        start = int(self.pointer[i])
        return memoryview(self.data[start : start + int(self.size[i])])


def open_beton(path: str | os.PathLike) -> BetonFile:
    """Maps a .beton file and checks that all it points to is there; reads no image.

    Class names and the length in bytes come from the manifest `path`.json where there is one; without one the classes
    are "0" to the largest label. Raises ValueError, one sentence, for a file that is missing, foreign, cut short, or
    of a conversion that did not finish.
    """
    path = os.fspath(path)
    data = _map(path)
    header = data[: HEADER.itemsize].view(HEADER)[0]
    if header["version"] != VERSION or not 0 < header["fields"] < 256:
        raise ValueError(f"{path} is not a .beton file that FFCV 1.0 wrote: give one that 'fastssl prep beton' made")
    if header["table"] == 0:
        raise ValueError(f"the conversion that wrote {path} did not finish: convert the images again")
    image, label = _read_metadata(path, data, header)
    pointer = image["pointer"].astype(np.int64)
    size = _sizes(path, _read_table(path, data, header), pointer)
    label = np.full(len(image), -1, np.int64) if label is None else label.astype(np.int64)
    manifest = read_manifest(path)
    if manifest and manifest["file_bytes"] != len(data):
        raise _cut(path, f"its manifest tells of {manifest['file_bytes']:,} bytes and there are {len(data):,}")
    if manifest and manifest["num_images"] != len(label):
        raise ValueError(f"{path} has {len(label):,} images, its manifest tells of {manifest['num_images']:,}")
    names = [str(c) for c in range(label.max(initial=-1) + 1)] if not manifest else list(manifest["class_names"])
    if names and label.max(initial=-1) >= len(names):
        raise ValueError(f"{path} has a label {label.max()}, but its manifest names {len(names)} classes")
    mode, height, width = image["mode"].copy(), image["height"].astype(np.int32), image["width"].astype(np.int32)
    beton = BetonFile(path, data, label, mode, height, width, pointer, size, names)
    _check_images(beton, int(header["table"]))
    return beton


def read_manifest(path: str | os.PathLike) -> dict | None:
    """What `fastssl prep beton` wrote beside the file, or None; raises ValueError when it cannot be read."""
    name = f"{os.fspath(path)}.json"
    if not os.path.exists(name):
        return None
    try:
        with open(name, encoding="utf-8") as file:
            manifest = json.load(file)
        if not {"num_images", "class_names", "file_bytes"} <= set(manifest):
            raise ValueError("keys are missing")
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"cannot read the manifest {name} ({error}): remove it, or convert the images again") from None
    return manifest


def _map(path: str) -> np.ndarray:
    """The file's bytes, not read until they are used."""
    if not os.path.isfile(path):
        what = "is a folder, not a .beton file" if os.path.isdir(path) else "does not exist"
        raise ValueError(f"{path} {what}: give a file that 'fastssl prep beton' made")
    if os.path.getsize(path) < HEADER.itemsize:
        raise _cut(path, f"{os.path.getsize(path)} bytes are less than its header")
    return np.asarray(np.memmap(path, np.uint8, "r"))


def _read_metadata(path: str, data: np.ndarray, header: np.void) -> tuple[np.ndarray, np.ndarray | None]:
    """The rows of the image field and, if there is one, of the label field."""
    start = HEADER.itemsize + int(header["fields"]) * DESCRIPTOR.itemsize
    if start > len(data):
        raise _cut(path, "it ends within its header")
    fields = data[HEADER.itemsize : start].view(DESCRIPTOR)
    kinds, names = fields["type"].tolist(), [name.decode("ascii", "replace") for name in fields["name"].tolist()]
    if unknown := [name for kind, name in zip(kinds, names) if kind not in FIELD_METADATA]:
        raise ValueError(f"{path} has a field {unknown[0]!r} of a kind that FFCV does not define: write it without")
    row = np.dtype([(f"f{i}", FIELD_METADATA[kind]) for i, kind in enumerate(kinds)], align=True)
    end = start + int(header["samples"]) * row.itemsize
    if end > min(len(data), int(header["table"])):
        raise _cut(path, f"there is no room for the metadata of {header['samples']:,} images")
    rows = data[start:end].view(row)
    image = _choose(path, kinds, names, IMAGE_FIELD, "image")
    if image is None:
        raise ValueError(f"{path} has no image field, only {', '.join(names)}: write it with an RGBImageField")
    label = _choose(path, kinds, names, INT_FIELD, "label")
    return rows[f"f{image}"], None if label is None else rows[f"f{label}"]


def _choose(path: str, kinds: list[int], names: list[str], kind: int, name: str) -> int | None:
    """The number of the only field of a kind, or of the one called `name` among several."""
    found = [i for i, k in enumerate(kinds) if k == kind]
    named = [i for i in found if names[i] == name]
    if len(found) > 1 and not named:
        raise ValueError(f"{path} has {len(found)} fields that could be the {name}: call one of them {name!r}")
    return (named or found or [None])[0]


def _read_table(path: str, data: np.ndarray, header: np.void) -> np.ndarray:
    start = int(header["table"])
    if start > len(data):
        raise _cut(path, f"its allocation table begins at byte {start:,}, the file ends at {len(data):,}")
    if (len(data) - start) % ALLOCATION.itemsize:
        raise _cut(path, f"{len(data) - start:,} bytes are no whole allocation table")
    return data[start:].view(ALLOCATION)


def _sizes(path: str, table: np.ndarray, pointer: np.ndarray) -> np.ndarray:
    """(n,) int64: the bytes that were allocated at each pointer, found by one sort."""
    table = table[np.lexsort((table["size"], table["pointer"]))]
    known = table["pointer"].astype(np.int64)
    place = np.searchsorted(known, pointer, side="right") - 1  # of several the last: an empty one may lie before it
    missing = place < 0
    if len(known):
        missing |= known[place] != pointer
    if missing.any():
        first = int(missing.argmax())
        raise _cut(path, f"its allocation table misses {missing.sum():,} images, the first is {first}")
    return table["size"][place].astype(np.int64)


def _check_images(beton: BetonFile, table: int) -> None:
    """Every image must have pixels, a known mode, and bytes before the table."""
    pixel_bytes = beton.height.astype(np.int64) * beton.width * 3
    wrong = {
        "has no pixels": pixel_bytes == 0,
        "is stored in an unknown way": beton.mode > RAW,
        "has too few or too many bytes for its height and width": (beton.mode == RAW) & (beton.size != pixel_bytes),
        "lies outside of the file's data": (beton.pointer < HEADER.itemsize) | (beton.pointer + beton.size > table),
    }
    for what, where in wrong.items():
        if where.any():
            raise ValueError(f"{beton.path} is damaged: image {int(where.argmax())} {what}; convert the images again")


def _cut(path: str, how: str) -> ValueError:
    return ValueError(f"{path} is cut short or damaged: {how}; copy it again, or convert the images again")
