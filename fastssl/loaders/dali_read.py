"""Decides what DALI decodes: plain JPEGs. All other images are decoded here, by Pillow.

A plain JPEG is 8-bit, Huffman-coded, grey or YCbCr, upright and complete. Anything else (PNG, CMYK, rotated by EXIF,
truncated) is decoded, or found unreadable, by the folder loader's function, so that the loaders agree.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastssl.data_prep.decode import MAX_PIXELS, BadImage
from fastssl.data_prep.jpeg import NotPlain, read_jpeg_facts
from fastssl.loaders.bad_images import BadImages
from fastssl.loaders.encoded import EncodedImages


class Item(NamedTuple):
    """An image to be put into a batch: the bytes of a JPEG for DALI, or decoded pixels."""

    index: int
    label: int
    jpeg: np.ndarray | None  # (bytes,) uint8
    pixels: np.ndarray | None  # (H, W, 3) uint8


def is_plain_jpeg(data: bytes) -> bool:
    """Whether every JPEG decoder decodes this file as Pillow does."""
    try:
        facts = read_jpeg_facts(data)
    except NotPlain:
        return False
    # Adobe's marker may say that the components are RGB, not YCbCr.
    return facts.width * facts.height <= MAX_PIXELS and b"Adobe\0" not in data


class ItemReader:
    """Reads images by index. Thread-safe. on_bad_image: "skip" or "error" (`BadImages`)."""

    def __init__(self, encoded: EncodedImages, on_bad_image: str) -> None:
        self.encoded = encoded
        self.images = BadImages(on_bad_image, len(encoded.label), encoded.decode)
        self.refused: set[int] = set()  # plain JPEGs that DALI nevertheless could not decode

    def read(self, index: int, replace: bool) -> Item | None:
        """Image `index`. If it cannot be read: with `replace` its replacement, otherwise None."""
        if index not in self.images and index not in self.refused:
            try:
                data = self.encoded.read(index)
            except BadImage:
                data = b""  # `self.images` below reads it again and reports the error
            if is_plain_jpeg(data):
                return Item(index, int(self.encoded.label[index]), np.frombuffer(data, dtype=np.uint8), None)
        if replace:
            pixels, used = self.images.load_replacing(index)
        else:
            pixels, used = self.images.load(index), index
        return None if pixels is None else Item(index, int(self.encoded.label[used]), None, pixels)
