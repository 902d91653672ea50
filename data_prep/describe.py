"""`fastssl prep describe`: prints what a .beton file or a folder of shards holds, from its tables and its manifest."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from fastssl.data_prep.beton_format import IMAGE_FIELD, INT_FIELD, RAW, BetonTables, read_tables, record_sizes
from fastssl.data_prep.manifest import manifest_path, read_manifest
from fastssl.plural import counted

_BAR = 40  # characters of the longest bar
_MOST_LISTED = 10
_FIELD_NAMES = ("float", "int", "image", "bytes", "array", "json", "tensor")


def describe(path: str | os.PathLike) -> str:
    """Counts, classes, sizes, options and a histogram, as lines of text. Works for FFCV's files too.

    Raises ValueError for a truncated file, a file that is not a .beton file, and a folder without shards.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    manifest = read_manifest(path)
    if path.is_dir():
        if manifest is None:
            raise ValueError(f"{path} has no manifest.json, so it is no folder of shards: name one, or a .beton file")
        images, shards = counted(manifest["num_images"], "image"), counted(len(manifest["shards"]) // 2, "shard")
        total = sum(shard["bytes"] for shard in manifest["shards"])
        return "\n".join([f"{path}: {images} in {shards}, {total:,} bytes", *_manifest_lines(manifest)])
    tables = read_tables(path)
    if manifest and (manifest["file_bytes"], manifest["num_images"]) != (len(tables.data), len(tables.samples)):
        raise ValueError(
            f"{path} does not match its manifest {manifest_path(path)}: run fastssl prep verify, or convert again"
        )
    samples = counted(len(tables.samples), "sample")
    lines = [f"{path}: {samples}, {len(tables.data):,} bytes, pages of {tables.page_size:,} bytes"]
    lines += _table_lines(tables)
    lines += ["manifest  none: made by another program"] if manifest is None else _manifest_lines(manifest)
    return "\n".join(lines)


def _table_lines(tables: BetonTables) -> list[str]:
    lines = ["fields    " + ", ".join(f"{name} ({_FIELD_NAMES[kind]})" for name, kind in tables.fields)]
    try:
        labels, images = tables.column(INT_FIELD, "label"), tables.column(IMAGE_FIELD, "image")
    except ValueError as error:  # the fields are what its reader must know
        return [*lines, f"unusable  {error}"]
    if labels is not None and len(labels):
        counts = np.unique(labels, return_counts=True)[1]
        lines.append(
            f"labels    {len(counts):,} different, {labels.min()} to {labels.max()}; "
            f"{counts.min():,} to {counts.max():,} samples each"
        )
    if images is None or not len(images):
        return [*lines, "images    none"]
    raw, sizes = int((images["mode"] == RAW).sum()), record_sizes(tables, images["pointer"])
    lines.append(f"images    {len(images) - raw:,} JPEG, {raw:,} raw; {int(sizes.mean()):,} bytes on average")
    for name in ("width", "height"):
        low, middle, high = np.quantile(images[name], [0, 0.5, 1], method="nearest")
        lines.append(f"{name:8}  {low} to {high} pixels, median {middle}")
    return [*lines, "bytes of an image", *_histogram(sizes)]


def _manifest_lines(manifest: dict) -> list[str]:
    names, left_out = manifest["class_names"], manifest["quarantined"]
    shown = ", ".join(names[:_MOST_LISTED]) + (", ..." if len(names) > _MOST_LISTED else "")
    given = {name: value for name, value in manifest["options"].items() if value is not None and value is not False}
    options = ", ".join(f"{name} {value}" for name, value in given.items())
    lines = [
        f"source    {manifest['source']}",
        f"options   {options}",
        f"classes   {len(names):,}" + (f": {shown}" if names else ""),
        "stored    " + ", ".join(f"{count:,} {how}" for how, count in manifest["stored"].items()),
    ]
    if manifest["notes"]:
        lines.append("of them   " + ", ".join(f"{count:,} {note}" for note, count in manifest["notes"].items()))
    lines.append(f"left out  {len(left_out):,}")
    lines += [f"    {image['path']}: {image['reason']}" for image in left_out[:_MOST_LISTED]]
    if len(left_out) > _MOST_LISTED:
        lines.append("    ...")
    return lines


def _histogram(sizes: np.ndarray) -> list[str]:
    """A line for each power of two between the smallest and the largest size."""
    powers = np.floor(np.log2(np.maximum(sizes, 1))).astype(int)
    counts = np.bincount(powers)
    return [
        f"  {_bytes(2**power):>8} to {_bytes(2 ** (power + 1)):>8}  {counts[power]:9,}  "
        + "#" * round(_BAR * counts[power] / counts.max())
        for power in range(powers.min(), powers.max() + 1)
    ]


def _bytes(number: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number} {unit}"
        number //= 1024
    return f"{number} GiB"
