"""`fastssl prep shards`: converts images to a folder of WebDataset tar files, each with an index file for DALI."""

from __future__ import annotations

import io
import math
import os
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from fastssl.data_prep.beton_format import RAW
from fastssl.data_prep.convert import prepared_images
from fastssl.data_prep.files import file_sum, partial_files, partial_folder, partial_path, sync_folder
from fastssl.data_prep.manifest import Tally, make_manifest, read_manifest
from fastssl.data_prep.prepare import Prepared, Store
from fastssl.data_prep.sources import Selection, open_source
from fastssl.data_prep.work_pool import Work

_INDEX_VERSION = "v1.2"  # DALI's wds2idx: a line for each sample, with extension, offset, size and name of its files


class Shard:
    """A tar file of samples, and its index. The same samples give the same bytes."""

    def __init__(self, path: Path) -> None:
        self.path, self.num_images = path, 0
        self._index: list[str] = []
        self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 (closed in `close`)

    def size_with(self, image: Prepared) -> int:
        """The size of the finished tar file if this image is the last one added."""
        # blocks of the image, of two headers, of its class and of a PPM's first line, and two at the end of the file
        blocks = math.ceil(len(image.data) / tarfile.BLOCKSIZE) + 6
        size = self._tar.offset + blocks * tarfile.BLOCKSIZE
        return math.ceil(size / tarfile.RECORDSIZE) * tarfile.RECORDSIZE

    def add(self, number: int, image: Prepared, label: int) -> None:
        """Appends sample `number`: its image, then its class."""
        kind, data = ("ppm", ppm(image)) if image.mode == RAW else ("jpg", image.data)
        parts = []
        for extension, content in ((kind, data), ("cls", str(label).encode("ascii"))):
            member = tarfile.TarInfo(f"{number:09d}.{extension}")  # owner, time and mode are constants
            member.size = len(content)
            self._tar.addfile(member, io.BytesIO(content))
            size_on_tape = math.ceil(len(content) / tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            parts.append(f"{extension} {self._tar.offset - size_on_tape} {len(content)} {member.name}")
        self._index.append(" ".join(parts))
        self.num_images += 1

    def close(self) -> list[dict[str, object]]:
        """Finishes both files; returns their entries for the manifest."""
        self._tar.close()
        index = self.path.with_suffix(".idx")
        index.write_text("\n".join([f"{_INDEX_VERSION} {self.num_images}", *self._index]) + "\n", "ascii")
        entries = []
        for path in (self.path, index):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            entry = {"name": path.name, "bytes": path.stat().st_size, "sha256": file_sum(path)}
            entries.append({**entry, "images": self.num_images})
        return entries


def ppm(image: Prepared) -> bytes:
    """Raw pixels as a PPM file, which every image library reads."""
    return f"P6\n{image.width} {image.height}\n255\n".encode("ascii") + image.data


def write_shards(
    data: str | os.PathLike,
    out: str | os.PathLike,
    store: Store,
    selection: Selection,
    work: Work,
    shard_size: int = 512,
    force: bool = False,
) -> Tally:
    """Converts `data` to a folder `out` of shards, each of at most `shard_size` million bytes or a single image.

    Order and labels are those of `write_beton`. The folder appears only when it is complete.
    Raises ValueError as `write_beton` does, and when `out` is a folder of something else, or cannot be replaced.
    """
    out = Path(os.path.realpath(out))  # a link stays, and leads to the new folder
    _refuse_foreign(out, force)
    if shard_size < 1:
        raise ValueError(f"--shard-size must be at least 1 (million bytes), got {shard_size}")
    source = open_source(data, selection)
    with partial_folder(out) as partial:
        with partial_files(partial / "images.jsonl", partial / "manifest.json") as (lines, facts):
            tally = Tally(source, lines)
            shards = _write(partial, prepared_images(source, store, work, tally), shard_size * 1_000_000)
            content = {**tally.summary(store, selection, "images.jsonl"), "shards": shards}
            facts.write(make_manifest("shards", content))
        old = partial_path(partial)
        if old.exists():  # left by a killed run
            shutil.rmtree(old)
        if out.exists():  # moved first, because removing large files takes long enough to be stopped in the middle
            os.replace(out, old)
        os.replace(partial, out)
    sync_folder(out.parent)
    if old.exists():
        shutil.rmtree(old)
    return tally


def _write(folder: Path, images: Iterator[tuple[Prepared, int]], most_bytes: int) -> list[dict[str, object]]:
    """Writes the shards; returns their entries for the manifest."""
    entries, shard = [], None
    with closing(images):
        for number, (image, label) in enumerate(images):
            if shard is not None and shard.size_with(image) > most_bytes:
                entries += shard.close()
                shard = None
            shard = shard or Shard(folder / f"shard-{len(entries) // 2:06d}.tar")
            shard.add(number, image, label)
    return entries + shard.close()


def _refuse_foreign(out: Path, force: bool) -> None:
    """Raises ValueError when `out` holds anything, unless it is a folder of shards and may be replaced (`force`)."""
    if not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and read_manifest(out) is None):
        raise ValueError(f"{out} exists and is not a folder of shards: choose another name")
    if not force and any(out.iterdir()):
        raise ValueError(f"{out} exists: add --force to replace it")
    if os.path.ismount(out) or out == Path.cwd():  # found out now, not when all the work is done
        raise ValueError(f"{out} is a mount point or the current folder, which cannot be replaced: name a folder in it")
