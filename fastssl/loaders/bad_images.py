"""What every loader does about images that cannot be decoded (`--on-bad-image`)."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from fastssl.data_prep.decode import BadImage
from fastssl.plural import counted

MAX_BAD_RUN = 1000  # so many unreadable images in a row mean that the data set is broken


class BadImages:
    """Decodes images one at a time, remembers the unreadable ones, and finds replacements for them. Thread-safe.

    decode: maps an index to pixels, (H, W, 3) uint8, or raises BadImage. policy: "skip" replaces an unreadable image by
    the next readable one in file order (its pixels and label, but the index, and so the augmentation, of the unreadable
    one), or leaves it out of an evaluation; "error" raises ValueError.
    """

    def __init__(self, policy: str, num_images: int, decode: Callable[[int], np.ndarray]) -> None:
        self.policy, self.num_images, self.decoded = policy, num_images, 0
        self._decode = decode
        self._reasons: dict[int, str] = {}  # texts, because an exception's traceback would keep the file's bytes
        self._lock = threading.Lock()

    @property
    def messages(self) -> list[str]:
        """The unreadable images met so far, "path: reason", in the order in which they were met."""
        return list(self._reasons.copy().values())

    def __contains__(self, index: int) -> bool:
        return index in self._reasons

    def count(self, images: int) -> None:
        """Counts images that were decoded elsewhere."""
        with self._lock:
            self.decoded += images

    def load(self, index: int) -> np.ndarray | None:
        """The pixels of image `index`, or None when it cannot be decoded; raises ValueError with policy "error"."""
        if index in self._reasons:
            return None
        try:
            pixels = self._decode(index)
        except BadImage as error:
            if self.policy == "error":
                raise ValueError(f"cannot decode {error}; repair or remove it, or use --on-bad-image skip") from error
            self._reasons[index] = str(error)
            return None
        self.count(1)
        return pixels

    def next_readable(self, index: int) -> int:
        """`index`, or the next image in file order that is not known to be unreadable."""
        for i in range(index, index + min(self.num_images, MAX_BAD_RUN)):
            if i % self.num_images not in self._reasons:
                return i % self.num_images
        return index

    def load_replacing(self, index: int) -> tuple[np.ndarray, int]:
        """The pixels of image `index` or of its replacement, and the index of the image that was used."""
        tries = min(self.num_images, MAX_BAD_RUN)
        for i in range(index, index + tries):
            i %= self.num_images
            pixels = self.load(i)
            if pixels is not None:
                return pixels, i
        files = counted(tries, "image")
        raise ValueError(f"{files} in a row cannot be decoded, the first is {self._reasons[index]}; check the data")
