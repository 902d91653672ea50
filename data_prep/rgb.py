"""Turns an image that Pillow has opened into the RGB picture that a viewer would show."""

from __future__ import annotations

import numpy as np
from PIL import Image

_ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
_ORIENTATION = 0x0112  # EXIF tag
_T = Image.Transpose
_TURNS = _T.FLIP_LEFT_RIGHT, _T.ROTATE_180, _T.FLIP_TOP_BOTTOM, _T.TRANSPOSE, _T.ROTATE_270, _T.TRANSVERSE, _T.ROTATE_90


def to_rgb(image: Image.Image) -> Image.Image:
    """Decodes an opened image, upright and in mode RGB. Raises whatever its decoder raises for damaged data."""
    if (orientation := orientation_of(image)) != 1:  # not by Pillow's exif_transpose, which fails on damaged EXIF
        image = image.transpose(_TURNS[orientation - 2])
    if image.mode.startswith("I"):
        return _from_16_bit(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy an RGB image too


def orientation_of(image: Image.Image) -> int:
    """EXIF's orientation, 1 (upright) to 8. Decodes the pixels, and raises what that raises."""
    image.load()  # getexif does so for some formats, and damaged pixels must not be taken for damaged EXIF
    try:
        return range(1, 9).index(image.getexif().get(_ORIENTATION)) + 1
    except Exception:  # damaged EXIF, or text where a number should be, says nothing about the pixels
        return 1


def _from_16_bit(image: Image.Image) -> Image.Image:
    """16-bit greyscale to RGB by its high byte, as Pillow does for 16-bit colour; `convert` would clip at 255."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError("32-bit pixels have no agreed range")
    return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
