"""The manifest beside a converted data set: its contents, its origin, and checksums of everything.

FILE.json (or manifest.json in a folder of shards) holds
    format, kind            1; "beton" or "shards"
    num_images              images stored; sample i of the data set is line i of the listing
    image_bytes             their size as stored, without tables
    class_names             in the order of the labels, empty without classes; class_counts: images in each
    options, source         the options of the conversion; the folder or tar file
    stored                  number of images stored as "passed" (the file's own bytes), "encoded" or "raw"
    notes                   number of files that were not upright RGB JPEGs, by what they were
    sides                   smallest, median and largest of the short and of the long side, in pixels
    quarantined             [{"path", "reason"}], the images left out
    listing                 {"name", "sha256"} of a file with a line of JSON for each image, {"path", "notes"?}
    file_bytes, block_bytes, block_sha256     for a .beton file
    shards                  [{"name", "bytes", "sha256", "images"}] of the shards and their index files
    sha256                  of this manifest without this key
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from fastssl.data_prep.beton_format import RAW
from fastssl.plural import counted

if TYPE_CHECKING:
    from fastssl.data_prep.decode import BadImage
    from fastssl.data_prep.prepare import Prepared, Store
    from fastssl.data_prep.sources import Place, Selection, Source

FORMAT = 1
MOST_CLASSES = 10_000_000  # a larger label cannot be a class number: names for all would fill the memory


class Tally:
    """Counts the images of a conversion, for the manifest, and writes the listing."""

    def __init__(self, source: Source, listing: BinaryIO) -> None:
        self._source, self._listing, self._sum = source, listing, hashlib.sha256()
        self._stored, self._notes = Counter(), Counter()
        self._sides: list[tuple[int, int]] = []
        self._labels = Counter()
        self.bytes = 0
        self.quarantined: list[dict[str, str]] = []

    @property
    def num_images(self) -> int:
        """Images stored so far."""
        return len(self._sides)

    @property
    def has_classes(self) -> bool:
        """Whether the images have labels."""
        return bool(self._source.folder.class_names)

    @property
    def notices(self) -> Sequence[str]:
        """What one might not expect of the source."""
        return self._source.folder.notices

    def add(self, place: Place, image: Prepared, label: int) -> None:
        """Counts and lists an image that was stored."""
        line: dict[str, object] = {"path": place.name}
        if image.notes:
            line["notes"] = image.notes
        text = (json.dumps(line) + "\n").encode("ascii")
        self._listing.write(text)
        self._sum.update(text)
        if image.passed:
            self._stored["passed"] += 1
        else:
            self._stored["raw" if image.mode == RAW else "encoded"] += 1
        self._notes.update(image.notes)
        self._sides.append((min(image.width, image.height), max(image.width, image.height)))
        self._labels[label] += 1
        self.bytes += len(image.data)

    def leave_out(self, error: BadImage) -> None:
        """Records an image that was not stored, with the reason."""
        self.quarantined.append({"path": error.path, "reason": error.reason})

    def summary(self, store: Store, selection: Selection, listing: str) -> dict[str, object]:
        """The part of the manifest that both kinds have."""
        names = self._source.folder.class_names
        sides = np.sort(np.array(self._sides, dtype=np.int64), axis=0)
        return {
            "num_images": self.num_images,
            "image_bytes": self.bytes,
            "class_names": names,
            "class_counts": [self._labels[i] for i in range(len(names))],
            "options": {**asdict(store), **asdict(selection)},
            "source": self._source.folder.root,
            "stored": dict(self._stored),
            "notes": dict(sorted(self._notes.items())),
            "sides": {
                name: [int(sides[i, column]) for i in (0, len(sides) // 2, -1)]
                for column, name in enumerate(("short", "long"))
            },
            "quarantined": self.quarantined,
            "listing": {"name": listing, "sha256": self._sum.hexdigest()},
        }


def manifest_path(data: Path) -> Path:
    """The path of the manifest of a .beton file or of a folder of shards."""
    return data / "manifest.json" if data.is_dir() else data.with_name(data.name + ".json")


def described(data: Path) -> Path:
    """The name that the manifest lies beside: that of the file which a link leads to, if none lies beside the link."""
    return data if manifest_path(data).exists() else Path(os.path.realpath(data))


def listing_path(beton: Path) -> Path:
    """The path of the listing of a .beton file."""
    return beton.with_name(beton.name + ".images.jsonl")


def make_manifest(kind: str, content: dict[str, object]) -> bytes:
    """What a manifest's file holds."""
    content = {"format": FORMAT, "kind": kind, **content}
    return (json.dumps({**content, "sha256": _sum(content)}, indent=1) + "\n").encode("ascii")


def read_manifest(data: Path) -> dict | None:
    """The manifest of a .beton file or of a folder of shards, checked; None if there is none.

    Raises ValueError when it is damaged, has another format, or belongs to something else: without a valid manifest
    the names of the classes would be unknown.
    """
    path, kind = manifest_path(described(data)), "shards" if data.is_dir() else "beton"
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
        claimed = content.pop("sha256")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or not a manifest: move it away, or convert the images again") from error
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {content.get('format')} but this version reads {FORMAT}: convert the images again"
        )
    if claimed != _sum(content):
        raise ValueError(f"{path} is damaged: its content does not match its checksum; convert the images again")
    if content["kind"] != kind:
        raise ValueError(f"{path} is a manifest of {content['kind']}, not of {data}: convert the images again")
    return content


def check_count(data: str | Path, manifest: dict | None, num_images: int) -> None:
    """Raises ValueError when a data set has more or fewer images than its manifest, if there is one, says."""
    if manifest and manifest["num_images"] != num_images:
        raise ValueError(
            f"{data} has {counted(num_images, 'image')}, and its manifest says {manifest['num_images']:,}: copy it "
            "again, or convert the images again"
        )


def name_classes(data: Path, manifest: dict | None, largest: int) -> list[str]:
    """The names of the classes 0 to `largest` (-1: none): those in the manifest or, without one, the numbers.

    Raises ValueError when the manifest names fewer classes, or `largest` cannot be a class number.
    """
    if largest >= MOST_CLASSES:
        raise ValueError(f"{data} has a label {largest:,}, too large for a class number: number the classes from 0")
    if manifest is None:
        return [str(number) for number in range(largest + 1)]
    names = list(manifest["class_names"])
    if largest >= len(names):
        named = counted(len(names), "class", "classes")
        raise ValueError(f"{data} has a label {largest} but its manifest names {named}: convert the images again")
    return names


def _sum(content: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("ascii")).hexdigest()
