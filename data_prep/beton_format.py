"""The layout of a .beton file (version 2, that of FFCV 1.0), and a reader of its tables that does not need FFCV.

    header | a descriptor for each field | a metadata row for each sample | padding | records | allocation table

All numbers are little-endian. A record (the bytes of an image) never crosses the end of a page, because FFCV's process
cache reads whole pages. The allocation table extends to the end of the file, so nothing may follow it. The metadata say
where a sample's record begins, but only the table says how long it is; FFCV does not notice a truncated table and shows
wrong pixels.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np

from fastssl.plural import counted

VERSION = 2
JPEG, RAW = 0, 1  # an image's `mode`
HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page_size", "<u4"), ("samples", "<u8"), ("table", "<u8")], align=True
)
DESCRIPTOR = np.dtype([("type", "u1"), ("name", "S16"), ("arguments", "V1024")])
ALLOCATION = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])  # 13 bytes, not aligned
INT_FIELD, IMAGE_FIELD = 1, 2  # a descriptor's type
_SPAN = np.dtype([("pointer", "<u8"), ("size", "<u8")])
FIELD_METADATA = {  # by type: float, int, image, bytes, array, JSON, torch tensor
    0: np.dtype("<f8"),
    INT_FIELD: np.dtype("<i8"),
    IMAGE_FIELD: IMAGE,
    3: _SPAN,
    4: np.dtype("<u8"),
    5: _SPAN,
    6: np.dtype("<u8"),
}
SAMPLE = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)  # 24 bytes: a metadata row in the files we write
FRONT = HEADER.itemsize + 2 * DESCRIPTOR.itemsize  # where the metadata begin in the files we write


class BetonTables(NamedTuple):
    """Everything in a .beton file but the records. The arrays are views of the mapped file."""

    path: str
    data: np.ndarray  # (file bytes,) uint8, mapped and read-only
    page_size: int
    fields: list[tuple[str, int]]  # (name, type), in the order of the columns
    samples: np.ndarray  # (n,) structured, with a column for each field
    allocations: np.ndarray  # (m,) ALLOCATION
    allocations_at: int

    def column(self, kind: int, name: str) -> np.ndarray | None:
        """The metadata of the only field of type `kind`, or of the one called `name` among several; None without any.

        Raises ValueError when there are several and none has that name.
        """
        found = [i for i, (_, field_kind) in enumerate(self.fields) if field_kind == kind]
        if len(found) > 1:
            same_kind = len(found)
            found = [i for i in found if self.fields[i][0] == name]
            if not found:
                raise ValueError(
                    f"{self.path} has {same_kind} fields that could be the {name}: name one of them {name!r}"
                )
        return self.samples[self.samples.dtype.names[found[0]]] if found else None


def read_tables(path: str | os.PathLike) -> BetonTables:
    """Maps a .beton file and reads its tables, but no record.

    Raises ValueError when the file is missing, truncated, unfinished or not a .beton file.
    """
    path = os.fspath(path)
    data = _map(path)
    header = data[: HEADER.itemsize].view(HEADER)[0]
    if header["version"] != VERSION or not 0 < header["fields"] < 256:
        raise ValueError(f"{path} is not a .beton file of FFCV 1.0's format: make one with 'fastssl prep beton'")
    if header["table"] == 0:
        raise ValueError(f"the conversion that wrote {path} did not finish: convert the images again")
    at = int(header["table"])
    fields, samples = _read_samples(path, data, header)
    if at > len(data):
        raise truncated(path, f"its allocation table should begin at byte {at:,} but the file ends at {len(data):,}")
    if (len(data) - at) % ALLOCATION.itemsize:
        raise truncated(path, f"its allocation table has {len(data) - at:,} bytes, not a multiple of 24")
    return BetonTables(path, data, int(header["page_size"]), fields, samples, data[at:].view(ALLOCATION), at)


def _map(path: str) -> np.ndarray:
    """The bytes of the file, memory-mapped."""
    if not os.path.isfile(path):
        what = "is a folder, not a .beton file" if os.path.isdir(path) else "does not exist"
        raise ValueError(f"{path} {what}: make one with 'fastssl prep beton'")
    if os.path.getsize(path) < HEADER.itemsize:
        raise truncated(path, "it ends within its header")
    return np.asarray(np.memmap(path, np.uint8, "r"))


def _read_samples(path: str, data: np.ndarray, header: np.void) -> tuple[list[tuple[str, int]], np.ndarray]:
    """The fields and the metadata rows."""
    start = HEADER.itemsize + int(header["fields"]) * DESCRIPTOR.itemsize
    if start > len(data):
        raise truncated(path, "it ends within its header")
    descriptors = data[HEADER.itemsize : start].view(DESCRIPTOR)
    names = [name.decode("ascii", "replace") for name in descriptors["name"].tolist()]
    fields = list(zip(names, descriptors["type"].tolist()))
    if unknown := [name for name, kind in fields if kind not in FIELD_METADATA]:
        raise ValueError(f"{path} has a field {unknown[0]!r} of a type unknown to FFCV: write the file without it")
    row = np.dtype([("", FIELD_METADATA[kind]) for _, kind in fields], align=True)
    end = start + int(header["samples"]) * row.itemsize
    if end > min(len(data), int(header["table"])):
        raise truncated(path, f"there is no room for the metadata of {header['samples']:,} images")
    return fields, data[start:end].view(row)


def record_sizes(tables: BetonTables, pointer: np.ndarray) -> np.ndarray:
    """(n,) int64: the length in bytes of each sample's record, which begins at its `pointer` (n,).

    Raises ValueError when the allocation table lacks one.
    """
    table, pointer = tables.allocations[tables.allocations["sample"] < len(pointer)], pointer.astype(np.int64)
    sample = table["sample"].astype(np.int64)
    own = table["pointer"] == pointer.view(np.uint64)[sample]  # a sample's other fields have allocations too
    size = np.full(len(pointer), -1, np.int64)
    np.maximum.at(size, sample[own], table["size"][own].astype(np.int64))
    if (size < 0).any():
        first = int((size < 0).argmax())
        missing = counted(int((size < 0).sum()), "image")
        raise truncated(tables.path, f"its allocation table lacks {missing}, first image {first}")
    return size


def check_records(tables: BetonTables) -> None:
    """Raises ValueError when a record lies outside the file, or the allocation table lacks an image."""
    pointer, size, end = tables.allocations["pointer"], tables.allocations["size"], np.uint64(tables.allocations_at)
    inside = (pointer >= HEADER.itemsize) & (pointer <= end) & (size <= end - np.minimum(pointer, end))
    if not inside.all():
        raise ValueError(f"{tables.path} is damaged: record {int(np.argmin(inside))} lies outside the file")
    if (image := tables.column(IMAGE_FIELD, "image")) is not None:
        record_sizes(tables, image["pointer"])


def truncated(path: str, how: str) -> ValueError:
    """The error for a file that is not complete."""
    return ValueError(f"{path} is truncated or damaged: {how}; copy it again, or convert the images again")
