"""The manifest beside a converted data set: what is in it, what it was made from, and checksums of all of it.

FILE.json (or manifest.json in a folder of shards) holds
    format, kind            1; "beton" or "shards"
    num_images              stored; sample i of the data set is line i of the listing
    class_names             in the order of the labels, empty without classes; class_counts: images of each
    options, source         the exact options and the folder or tar files
    stored                  images by how they are stored: "passed" (the file's own bytes), "encoded", "raw"
    notes                   files that were no upright RGB JPEGs, counted by what they were
    sides                   smallest, median and largest of the short and of the long side, in pixels
    quarantined             [{"path", "reason"}], the images left out
    listing                 {"name", "sha256"}: a file with a line of JSON for each image, {"path", "notes"?}
    file_bytes, block_bytes, block_sha256     of a beton
    shards                  [{"name", "bytes", "sha256", "images"}] of shards and their index files
    sha256                  of this manifest without this key
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from fastssl.data_prep.beton_format import RAW
from fastssl.data_prep.files import partial_file

if TYPE_CHECKING:
    from fastssl.data_prep.images import BadImage
    from fastssl.data_prep.prepare import Prepared, Store
    from fastssl.data_prep.sources import Place, Selection, Source

FORMAT = 1
MOST_CLASSES = 10_000_000  # a larger label is no class number: a name for each would fill the memory


class Tally:
    """Counts what a conversion does and lists its images, for the manifest."""

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

    def add(self, place: Place, image: Prepared, label: int) -> None:
        """One more image is stored."""
        line = {"path": place.name, **({"notes": image.notes} if image.notes else {})}
        text = (json.dumps(line) + "\n").encode("ascii")
        self._listing.write(text)
        self._sum.update(text)
        self._stored["passed" if image.passed else "raw" if image.mode == RAW else "encoded"] += 1
        self._notes.update(image.notes)
        self._sides.append((min(image.width, image.height), max(image.width, image.height)))
        self._labels[label] += 1
        self.bytes += len(image.data)

    def leave_out(self, error: BadImage) -> None:
        """One image is not stored."""
        self.quarantined.append({"path": error.path, "reason": error.reason})

    def summary(self, store: Store, selection: Selection, listing: str) -> dict[str, object]:
        """The part of the manifest that all kinds share."""
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
    """Where the manifest of a beton or of a folder of shards lies."""
    return data / "manifest.json" if data.is_dir() else data.with_name(data.name + ".json")


def listing_path(beton: Path) -> Path:
    """Where the listing of a beton lies."""
    return beton.with_name(beton.name + ".images.jsonl")


def write_manifest(path: Path, kind: str, content: dict[str, object]) -> None:
    """Writes a manifest to its partial path; the caller renames it."""
    content = {"format": FORMAT, "kind": kind, **content}
    with partial_file(path) as file:
        file.write((json.dumps({**content, "sha256": _sum(content)}, indent=1) + "\n").encode("ascii"))


def read_manifest(data: Path) -> dict | None:
    """The manifest of a beton or of a folder of shards, checked; None where there is none.

    Raises ValueError when it is damaged, of another format, or that of something else: what lies under its name must
    be the manifest, or nobody could tell whose classes the labels number.
    """
    path, kind = manifest_path(data), "shards" if data.is_dir() else "beton"
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
        claimed = content.pop("sha256")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or no manifest: move it away, or convert the images again") from error
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {content.get('format')}, and this program reads {FORMAT}: convert the images again"
        )
    if claimed != _sum(content):
        raise ValueError(f"{path} is damaged: its checksum is not that of its content; convert the images again")
    if content["kind"] != kind:
        raise ValueError(f"{path} is a manifest of {content['kind']} and not of {data}: convert the images again")
    return content


def name_classes(data: Path, manifest: dict | None, largest: int) -> list[str]:
    """Names of the classes 0 to `largest` (-1: none) of a data set: those of its manifest, without one the numbers.

    Raises ValueError when the manifest names fewer, or `largest` cannot be a class number.
    """
    if largest >= MOST_CLASSES:
        raise ValueError(f"{data} has a label {largest:,}, which is no class number: write it with classes from 0 on")
    names = [str(number) for number in range(largest + 1)] if manifest is None else list(manifest["class_names"])
    if largest >= len(names):
        raise ValueError(f"{data} has a label {largest}, but its manifest names {len(names)} classes")
    return names


def _sum(content: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("ascii")).hexdigest()
