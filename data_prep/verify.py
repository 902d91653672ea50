"""`fastssl prep verify`: checks that a converted data set is complete and unchanged since it was written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from tqdm import tqdm

from fastssl.data_prep.beton_format import IMAGE_FIELD, JPEG, BetonTables, check_records, read_tables, record_sizes
from fastssl.data_prep.decode import BadImage, open_image
from fastssl.data_prep.files import file_sum
from fastssl.data_prep.manifest import described, listing_path, manifest_path, read_manifest
from fastssl.data_prep.sources import Place, read_place
from fastssl.data_prep.tars import find_tars
from fastssl.data_prep.work_pool import Died, Work, WorkPool, ahead
from fastssl.plural import counted

_NAMED = 5  # damaged places that are named; further ones are only counted
_CHUNK = 64  # records per task
_AGAIN = "copy it again, or convert the images again"


def verify(path: str | os.PathLike, decode: bool = False, workers: int | None = None) -> str:
    """Checks a .beton file or a folder of shards against its manifest; returns a sentence on what was checked.

    Of a .beton file without a manifest (one of FFCV's) only the tables are checked. decode: also decodes every image
    of a .beton file and compares its size.
    Raises ValueError that names the damage, or a shard that is not in the manifest.
    """
    path, workers = Path(path), Work(workers).processes
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    manifest = read_manifest(path)
    if path.is_dir():
        if manifest is None:
            mend = "name a .beton file, or a folder of our shards"
            raise ValueError(f"{path} has no manifest.json, so it cannot be checked: {mend}")
        if decode:
            raise ValueError(f"--decode is for .beton files, but {path} is a folder of shards: remove --decode")
        return _verify_shards(path, manifest, workers)
    done = []
    if manifest is not None:
        _check_size(path, manifest["file_bytes"])
        _check_blocks(path, manifest, workers)
        _check_sum(listing_path(described(path)), manifest["listing"]["sha256"])
        done.append(f"{counted(len(manifest['block_sha256']), 'checksum')} correct")
    tables = read_tables(path)
    check_records(tables)
    done.append("tables valid")
    if decode:
        _check_images(path, tables, workers)
        done.append(f"{counted(len(tables.samples), 'image')} decoded")
    missing = "" if manifest else f"; without {manifest_path(path).name} the images cannot be checked for changes"
    return f"{path}: {', '.join(done)}{missing}"


def _verify_shards(folder: Path, manifest: dict, workers: int) -> str:
    files = [*manifest["shards"], manifest["listing"]]
    if foreign := {tar.name for tar in find_tars(folder)} - {shard["name"] for shard in manifest["shards"]}:
        raise ValueError(f"{folder / min(foreign)} is not in the manifest, but loaders would read it: move it away")
    for shard in manifest["shards"]:
        _check_size(folder / shard["name"], shard["bytes"])
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(lambda file: _check_sum(folder / file["name"], file["sha256"]), files):
            pass
    return f"{folder}: {counted(len(files), 'checksum')} correct"


def _check_size(path: Path, expected: int) -> None:
    _check_exists(path)
    found = path.stat().st_size
    if found != expected:
        what = "truncated" if found < expected else "longer than it was"
        raise ValueError(f"{path} is {what}: {found:,} bytes instead of {expected:,}; {_AGAIN}")


def _check_sum(path: Path, expected: str) -> None:
    _check_exists(path)
    if file_sum(path) != expected:
        raise ValueError(f"{path} is damaged: its checksum is not the one in the manifest; {_AGAIN}")


def _check_exists(path: Path) -> None:
    if not path.exists():
        raise ValueError(f"{path} is missing; {_AGAIN}")


def _check_blocks(path: Path, manifest: dict, workers: int) -> None:
    """Checks every block of the file; the error names the damaged bytes."""
    size, expected = manifest["block_bytes"], manifest["block_sha256"]
    handle = os.open(path, os.O_RDONLY)
    bar = tqdm(total=manifest["file_bytes"], unit="B", unit_scale=True, dynamic_ncols=True, disable=None)

    def differs(i: int) -> bool:
        block = os.pread(handle, size, i * size)
        bar.update(len(block))
        return hashlib.sha256(block).hexdigest() != expected[i]

    try:
        with bar, ThreadPoolExecutor(workers) as pool:
            damaged = [i for i, bad in enumerate(pool.map(differs, range(len(expected)))) if bad]
    finally:
        os.close(handle)
    if damaged:
        where = ", ".join(f"bytes {i * size:,} to {(i + 1) * size - 1:,}" for i in damaged[:_NAMED])
        more = ", ..." if len(damaged) > _NAMED else ""
        raise ValueError(f"{path} is damaged in {len(damaged):,} of {len(expected):,} blocks: {where}{more}; {_AGAIN}")


def _check_images(path: Path, tables: BetonTables, workers: int) -> None:
    """Decodes every image, in processes, because a damaged image can crash the process that decodes it."""
    images = tables.column(IMAGE_FIELD, "image")
    if images is None:
        raise ValueError(f"{path} has no image field: there is nothing to decode")
    sizes = record_sizes(tables, images["pointer"])

    def begin(first: int) -> tuple[list, object]:
        rows = range(first, min(first + _CHUNK, len(images)))
        items = [
            (Place(f"image {i}", str(path), int(images["pointer"][i]), int(sizes[i])), *images[i].item()[:3])
            for i in rows
        ]
        return items, pool.submit(items)

    bad: list[str] = []
    pool = WorkPool(_decode_record, workers)
    bar = tqdm(total=len(images), unit="images", dynamic_ncols=True, disable=None)
    with closing(pool), bar:
        begun: Iterator = map(begin, range(0, len(images), _CHUNK))
        for items, ticket in ahead(begun, 2 * workers):
            for item, reason in zip(items, pool.results(ticket)):
                if isinstance(reason, Died):
                    reason = "its decoder crashes"
                if reason is not None:
                    bad.append(f"{item[0].name}: {reason}")
                bar.update()
    if bad:
        more = f" and {len(bad) - _NAMED:,} more" if len(bad) > _NAMED else ""
        raise ValueError(f"{path}: cannot decode {'; '.join(bad[:_NAMED])}{more}; convert the images again")


def _decode_record(item: tuple[Place, int, int, int]) -> str | None:
    """Why a record is not the image that its metadata describe, or None."""
    place, mode, width, height = item
    try:
        data = read_place(place)
        if mode != JPEG:
            return None if len(data) == width * height * 3 else f"{len(data):,} bytes for {width} x {height} pixels"
        found = open_image(data, place.name).size
        return None if found == (width, height) else f"is {found[0]} x {found[1]}, not {width} x {height}"
    except BadImage as error:
        return error.reason
