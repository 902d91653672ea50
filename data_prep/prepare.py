"""Turns the bytes of an image file into the bytes to store: decoded, resized and encoded again, or as they are."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from fastssl.data_prep.beton_format import JPEG, RAW
from fastssl.data_prep.decode import MAX_PIXELS, BadImage, open_image
from fastssl.data_prep.jpeg import NotPlain, read_jpeg_facts
from fastssl.data_prep.rgb import orientation_of

_LONGEST = 65535  # a .beton file holds sides in 16 bits
_LONGEST_JPEG = 65500  # libjpeg's limit
_JPEG_NAMES = (".jpg", ".jpeg", ".jpe", ".jfif")


@dataclass(frozen=True)
class Store:
    """How images are stored."""

    short_side: int = 256
    """Shrink images so that their shorter side has this many pixels; smaller images keep their size, 0 keeps all."""
    originals: bool = False
    """Store the files as they are (implies --short-side 0); only what is not a plain, upright JPEG is encoded again."""
    quality: int = 90
    """JPEG quality of images that are encoded, from 1 to 95."""
    raw: bool = False
    """Store pixels instead of JPEGs: about ten times the size, but nothing to decode when training."""

    def __post_init__(self) -> None:
        if self.originals:
            if self.short_side not in (0, Store.short_side) or self.raw:
                other = "--raw" if self.raw else f"--short-side {self.short_side}"
                raise ValueError(f"--originals and {other} exclude each other: remove one of them")
            object.__setattr__(self, "short_side", 0)
        if self.short_side < 0:
            raise ValueError(f"--short-side must be 0 (keep every size) or more, got {self.short_side}")
        if not 1 <= self.quality <= 95:
            raise ValueError(f"--quality must be from 1 to 95, got {self.quality}")

    @property
    def passes(self) -> bool:
        """Whether plain JPEGs are stored without being decoded."""
        return self.short_side == 0 and not self.raw


class Prepared(NamedTuple):
    """An image as it is stored, and notes on what was unusual about its file."""

    mode: int  # JPEG or RAW
    width: int
    height: int
    data: bytes
    passed: bool  # whether these are the file's own bytes
    notes: tuple[str, ...] = ()


def pass_image(data: bytes) -> Prepared:
    """A plain JPEG as it is, without decoding it. Raises NotPlain for any other file."""
    facts = read_jpeg_facts(data)
    if facts.width * facts.height > MAX_PIXELS:
        raise NotPlain("too many pixels")
    notes = ("greyscale",) if len(facts.sampling) == 1 else ()
    return Prepared(JPEG, facts.width, facts.height, data, passed=True, notes=notes)


def prepare_image(data: bytes, name: str, store: Store) -> Prepared:
    """Decodes an image file of any kind and prepares it as `store` says. name: the file's, for messages and notes.

    A plain JPEG that need not shrink keeps its own bytes (unless `raw`); decoding it was only a check.
    Raises BadImage when it cannot be decoded or has too many rows or columns for the format.
    """
    notes: list[str] = []

    def look(image: Image.Image) -> None:
        if store.short_side:  # a JPEG decoder can halve sizes at no cost; twice the final size preserves quality
            image.draft(None, (2 * store.short_side, 2 * store.short_side))
        notes.extend(_oddities(image, name))

    try:
        image = open_image(data, name, look)
        smaller = shrink(image, store.short_side)
        if max(smaller.size) > (_LONGEST if store.raw else _LONGEST_JPEG):
            raise BadImage(name, f"a side of {max(smaller.size)} pixels is too long for the format")
        if store.raw:
            return Prepared(RAW, *smaller.size, smaller.tobytes(), passed=False, notes=tuple(notes))
        if smaller is image:
            try:
                return pass_image(data)._replace(notes=tuple(notes))
            except NotPlain as reason:
                notes = notes or [str(reason)]
        return Prepared(JPEG, *smaller.size, encode_jpeg(smaller, store.quality), passed=False, notes=tuple(notes))
    except MemoryError:
        raise BadImage(name, "there is not enough memory to decode it") from None


def shrink(image: Image.Image, short_side: int) -> Image.Image:
    """An RGB image with its shorter side at `short_side` pixels; the same object if that would not be smaller.

    Uses torch's antialiased bicubic filter, which is Pillow's but several times faster.
    """
    short = min(image.size)
    if not short_side or short <= short_side:
        return image
    import torch  # takes seconds to import, and only shrinking needs it

    width, height = (max(1, round(side * short_side / short)) for side in image.size)
    planes = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # (1, 3, H, W) uint8
    small = torch.nn.functional.interpolate(planes, (height, width), mode="bicubic", antialias=True)
    return Image.fromarray(small[0].permute(1, 2, 0).contiguous().numpy())


def encode_jpeg(image: Image.Image, quality: int) -> bytes:
    """A baseline JPEG with colours at half the resolution (4:2:0)."""
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=quality, subsampling=2, comment=b"")  # the file's may be too long for a JPEG
    return encoded.getvalue()


def _oddities(image: Image.Image, name: str) -> list[str]:
    """How a file differs from an upright RGB JPEG, in a few words each."""
    found = []
    if image.format not in ("JPEG", "MPO"):
        named = os.path.splitext(name)[1].lower()
        found.append(f"{image.format} named {named}" if named in _JPEG_NAMES else str(image.format))
    if image.mode == "CMYK":
        found.append("CMYK")
    raw_modes = [tile[3][0] if isinstance(tile[3], tuple) else tile[3] for tile in image.tile]
    if image.mode.startswith("I") or any(";16" in str(mode) for mode in raw_modes):
        found.append("16-bit")
    if image.mode in ("1", "L", "LA", "I") or image.mode.startswith("I;"):
        found.append("greyscale")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        found.append("transparency")
    if image.format != "MPO" and _is_animated(image):
        found.append("animation")
    if (orientation := orientation_of(image)) != 1:
        found.append(f"EXIF orientation {orientation}")
    return found


def _is_animated(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # a later frame is damaged, but only the first is used
        return True
