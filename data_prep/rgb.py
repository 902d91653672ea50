"""Turns an image that Pillow has opened into the RGB picture that a viewer would show."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

_ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
_ORIENTATION = 0x0112  # EXIF tag


def to_rgb(image: Image.Image) -> Image.Image:
    """Decodes an opened image, upright and in mode RGB. Raises whatever its decoder raises for damaged data."""
    if orientation_of(image) != 1:
        image = ImageOps.exif_transpose(image)
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
    """EXIF's orientation, 1 for upright. Decodes the pixels, and raises what that raises."""
    image.load()  # getexif does so for some formats, and damaged pixels must not be taken for damaged EXIF
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF says nothing about the pixels
        return 1


def _from_16_bit(image: Image.Image) -> Image.Image:
    """16-bit greyscale to RGB by its high byte, as Pillow does for 16-bit colour; `convert` would clip at 255."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError("32-bit pixels have no agreed range")
    return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
