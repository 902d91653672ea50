"""The layout of a .beton file, version 2, as FFCV 1.0 reads it.

    header | one descriptor a field | one metadata row a sample | padding | records in pages | allocation table

All numbers are little-endian. A record (an image's bytes) lies within one page: FFCV's process cache reads whole
pages. The allocation table runs to the end of the file, so nothing may follow it.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np

VERSION = 2
HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("alloc_table", "<u8")]
)
FIELD = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "u1", 1024)])
ALLOCATION = np.dtype([("sample_id", "<u8"), ("pointer", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])  # 13 bytes, not aligned
INT, RGB_IMAGE = 1, 2  # type ids
_SPAN = np.dtype([("pointer", "<u8"), ("size", "<u8")])
# Metadata of a sample by type id: float, int, image, bytes, array, JSON, torch tensor
TYPES = {0: "<f8", INT: "<i8", RGB_IMAGE: IMAGE, 3: _SPAN, 4: "<u8", 5: _SPAN, 6: "<u8"}
SAMPLE = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)  # 24 bytes: what our files have
FRONT = HEADER.itemsize + 2 * FIELD.itemsize  # where the metadata of our files begins


class BetonTables(NamedTuple):
    """Everything in a beton but the records: any file's, also one FFCV wrote."""

    page_size: int
    fields: dict[str, int]  # name -> type id
    samples: np.ndarray  # (n,) structured, one entry a field, in the order of `fields`
    allocations: np.ndarray  # (m,) ALLOCATION
    allocations_at: int
    file_bytes: int

    def column(self, type_id: int) -> np.ndarray | None:
        """The metadata of the first field of a type, None where there is none."""
        ids = list(self.fields.values())
        return self.samples[self.samples.dtype.names[ids.index(type_id)]] if type_id in ids else None


def read_tables(path: str | os.PathLike) -> BetonTables:
    """Reads and checks the tables of a beton; needs no FFCV.

    Raises ValueError when the file is no beton, is cut short, or its tables contradict each other.
    """
    file_bytes = os.stat(path).st_size
    with open(path, "rb") as file:
        (header,) = _read(file, HEADER, 1, path)
        if header["version"] != VERSION or not 1 <= header["num_fields"] <= 256:
            raise ValueError(f"{path} is not a .beton file of version {VERSION}")
        fields = _read(file, FIELD, int(header["num_fields"]), path)
        if unknown := [int(kind) for kind in fields["type_id"] if int(kind) not in TYPES]:
            raise ValueError(f"{path} has a field of a kind only its maker can read (type id {unknown[0]})")
        sample = np.dtype([("", TYPES[int(kind)]) for kind in fields["type_id"]], align=True)
        samples = _read(file, sample, int(header["num_samples"]), path)
        at, metadata_end = int(header["alloc_table"]), file.tell()
        if not metadata_end <= at <= file_bytes or (file_bytes - at) % ALLOCATION.itemsize:
            raise ValueError(f"{path} is cut short or was never finished: it does not end with its allocation table")
        file.seek(at)
        allocations = _read(file, ALLOCATION, (file_bytes - at) // ALLOCATION.itemsize, path)
    names = [name.decode("ascii", "replace") for name in fields["name"]]
    types = dict(zip(names, map(int, fields["type_id"])))
    tables = BetonTables(int(header["page_size"]), types, samples, allocations, at, file_bytes)
    _check(tables, metadata_end, path)
    return tables


def _read(file, dtype: np.dtype, count: int, path: str | os.PathLike) -> np.ndarray:
    if file.tell() + count * dtype.itemsize > os.fstat(file.fileno()).st_size:
        raise ValueError(f"{path} is cut short or no .beton file: it ends within its tables")
    return np.fromfile(file, dtype, count)


def _check(tables: BetonTables, metadata_end: int, path: str | os.PathLike) -> None:
    """Every record inside the file, every image's pointer in the allocation table."""
    pointer, size = tables.allocations["pointer"], tables.allocations["size"]
    inside = (pointer >= metadata_end) & (pointer <= tables.allocations_at) & (size <= tables.allocations_at - pointer)
    if not inside.all():
        raise ValueError(f"{path} is damaged: the record of sample {int(np.argmin(inside))} lies outside the file")
    if (images := tables.column(RGB_IMAGE)) is not None:
        known = np.isin(images["pointer"], pointer)
        if not known.all():
            raise ValueError(f"{path} is damaged: image {int(np.argmin(known))} is not in the allocation table")


def record_sizes(tables: BetonTables) -> np.ndarray:
    """(n,) uint64 bytes of each sample's image."""
    order = np.argsort(tables.allocations["pointer"], kind="stable")
    pointers, sizes = tables.allocations["pointer"][order], tables.allocations["size"][order]
    return sizes[np.searchsorted(pointers, tables.column(RGB_IMAGE)["pointer"])]
