"""Writes small .beton files for the tests, byte by byte, so that they can also be wrong."""

from __future__ import annotations

import ctypes.util
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from photos import render_photo
from PIL import Image

from fastssl.data_prep.beton_format import ALLOCATION, DESCRIPTOR, FIELD_METADATA, HEADER, IMAGE_FIELD, INT_FIELD, JPEG
from fastssl.data_prep.manifest import make_manifest, manifest_path

NO_TURBOJPEG = ctypes.util.find_library("turbojpeg") is None  # then nothing decodes the images of a beton
FFCV_PHOTOS = [render_photo(40 + 3 * i, 60 - 2 * i, seed=i) for i in range(12)]  # what the fixture by_ffcv writes
PAGE = 1 << 21
ROW = np.dtype([("image", FIELD_METADATA[IMAGE_FIELD]), ("label", "<i8")], align=True)
Stored = tuple[bytes, int, int, int, int]  # the image's bytes, height, width, mode, label


def encode_jpeg(pixels: np.ndarray, mode: str = "RGB", **options: object) -> bytes:
    """(H, W, 3) uint8 as a JPEG; `mode` may be another of Pillow's, options are those of its `save`."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG", **{"quality": 90, **options})
    return buffer.getvalue()


def stored_jpeg(pixels: np.ndarray, label: int = 0, **options: object) -> Stored:
    """An image as a beton holds it, compressed."""
    return encode_jpeg(pixels, **options), *pixels.shape[:2], JPEG, label


def write_beton(
    path: Path | str, images: Sequence[Stored], class_names: Sequence[str] | None = None, gap: int = 0
) -> Path:
    """Writes an FFCV 1.0 file with the fields image and label; with class names also the manifest beside it.

    gap: bytes of nothing behind each image, which take no room on the disk.
    """
    path = Path(path)
    rows, table = np.zeros(len(images), ROW), np.zeros(len(images), ALLOCATION)
    header = np.zeros(1, HEADER)
    fields = np.zeros(2, DESCRIPTOR)
    fields["type"], fields["name"] = (IMAGE_FIELD, INT_FIELD), (b"image", b"label")
    place = -(-(HEADER.itemsize + fields.nbytes + rows.nbytes) // PAGE) * PAGE
    with open(path, "wb") as file:
        for i, (data, height, width, mode, label) in enumerate(images):
            rows[i] = (mode, width, height, place), label
            table[i] = i, place, len(data)
            file.seek(place)
            file.write(data)
            place += len(data) + gap
        header[0] = 2, 2, PAGE, len(images), place
        file.seek(place)
        file.write(table.tobytes())
        file.seek(0)
        file.write(header.tobytes() + fields.tobytes() + rows.tobytes())
    if class_names is not None:
        put_manifest(path, num_images=len(images), class_names=list(class_names), file_bytes=path.stat().st_size)
    return path


def put_manifest(data: Path, **content: object) -> None:
    """The manifest of a beton or of a folder of shards, with what matters to a test."""
    manifest_path(data).write_bytes(make_manifest("shards" if data.is_dir() else "beton", content))
