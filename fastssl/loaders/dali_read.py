"""What DALI is given and what it is spared: plain JPEGs as bytes, everything else as pixels.

Plain is 8-bit, Huffman-coded, grey or YCbCr, upright, whole. What is anything else (PNG, CMYK, turned by EXIF, cut
short) is decoded, or found unreadable, by the function the folder loader uses, so that the two cannot disagree.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastssl.data_prep.images import MAX_PIXELS, BadImage, decode_image
from fastssl.data_prep.jpeg import NotPlain, read_jpeg_facts
from fastssl.loaders.bad_images import BadImages
from fastssl.loaders.encoded import EncodedImages


class Item(NamedTuple):
    """An image on its way: the bytes of a JPEG, or pixels."""

    index: int
    label: int
    jpeg: np.ndarray | None  # (bytes,) uint8
    pixels: np.ndarray | None  # (H, W, 3) uint8


def is_plain_jpeg(data: bytes) -> bool:
    """May every JPEG decoder be trusted to show this file as Pillow does?"""
    try:
        facts = read_jpeg_facts(data)
    except NotPlain:
        return False
    # Adobe's marker may say that the three components are RGB
    return facts.width * facts.height <= MAX_PIXELS and b"Adobe\0" not in data


class ItemReader:
    """Reads images by index; safe to use from several threads. on_bad_image: "skip" or "error" (`BadImages`)."""

    def __init__(self, encoded: EncodedImages, on_bad_image: str) -> None:
        self.encoded = encoded
        self.images = BadImages(on_bad_image, len(encoded.label), self._decode)
        self.refused: set[int] = set()  # plain JPEGs that DALI could not decode all the same

    def read(self, index: int, replace: bool) -> Item | None:
        """Image `index`; what takes its place when it cannot be read, or None where nothing is to `replace` it."""
        if index not in self.images and index not in self.refused:
            try:
                data = self.encoded.read(index)
            except BadImage:
                data = b""  # is met again, and reported, below
            if is_plain_jpeg(data):
                return Item(index, int(self.encoded.label[index]), np.frombuffer(data, dtype=np.uint8), None)
        pixels, used = self.images.load_replacing(index) if replace else (self.images.load(index), index)
        return None if pixels is None else Item(index, int(self.encoded.label[used]), None, pixels)

    def _decode(self, index: int) -> np.ndarray:
        return decode_image(self.encoded.read(index), self.encoded.name(index))
