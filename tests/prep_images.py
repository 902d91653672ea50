"""Image files of every kind a folder may hold, good and bad, for the tests of fastssl prep.

Imports no torch: worker processes import it too.
"""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path

import numpy as np
from PIL import Image

from fastssl.data_prep.convert import Outcome, prepare_place
from fastssl.data_prep.prepare import Store
from fastssl.data_prep.sources import Place


def render(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth (height, width, 3) uint8 picture under noise."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = np.stack([np.sin(7 * y + seed + c) * np.cos(5 * x + 2 * c) for c in range(3)], axis=-1)
    return np.clip(128 + 90 * waves + random.normal(0, 8, waves.shape), 0, 255).astype(np.uint8)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def jpeg(height: int, width: int, seed: int = 0, grey: bool = False, **options: object) -> bytes:
    image = Image.fromarray(render(height, width, seed)).convert("L" if grey else "RGB")
    return encode(image, "JPEG", **{"quality": 85, **options})


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return jpeg(30, 50, exif=exif)


def animation() -> bytes:
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "lime", "blue")]
    return encode(frames[0], "GIF", save_all=True, append_images=frames[1:])


def kinds() -> dict[str, tuple[bytes, str]]:
    """File name -> (bytes, its note in the manifest); all of them can be used."""
    photo = Image.fromarray(render(30, 50, 1))
    wide = Image.fromarray((np.asarray(photo.convert("L")).astype(np.uint16) << 8) + 7)
    return {
        "animation.gif": (animation(), "animation"),
        "cmyk.jpg": (encode(photo.convert("CMYK"), "JPEG"), "CMYK"),
        "grey.jpg": (encode(photo.convert("L"), "JPEG"), "greyscale"),
        "grey16.png": (encode(wide, "PNG"), "16-bit"),
        "png.jpg": (encode(photo, "PNG"), "PNG named .jpg"),
        "see_through.png": (encode(photo.convert("RGBA"), "PNG"), "transparency"),
        "turned.jpg": (turned(6), "EXIF orientation 6"),
    }


def bad_kinds() -> dict[str, tuple[bytes, str]]:
    """File name -> (bytes, a part of the reason it is left out for)."""
    photo = jpeg(60, 80)
    return {
        "cut.jpg": (photo[: len(photo) // 2], "truncated"),
        "empty.jpg": (b"", "empty"),
        "gone.jpg": (b"", "No such file"),  # a link to nowhere
        "text.jpg": (b"no image at all\n" * 40, "not an image"),
    }


def write_kinds(folder: Path, *groups: dict[str, tuple[bytes, str]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (data, reason) in {name: kind for group in groups for name, kind in group.items()}.items():
        if reason == "No such file":
            (folder / name).symlink_to(folder / "nowhere")
        else:
            (folder / name).write_bytes(data)
    return folder


def write_photos(root: Path, sizes: dict[str, list[tuple[int, int]]], **options: object) -> Path:
    """root/<class>/<i>.jpg of the given sizes."""
    for name, of_class in sizes.items():
        (root / name).mkdir(parents=True)
        for i, size in enumerate(of_class):
            (root / name / f"{i}.jpg").write_bytes(jpeg(*size, seed=i + len(name), **options))
    return root


def prepare_or_die(place: Place, store: Store) -> Outcome:
    """`prepare_place` with a decoder that takes its process with it at some images."""
    if "deadly" in place.name:
        os.kill(os.getpid(), signal.SIGKILL)
    return prepare_place(place, store)
