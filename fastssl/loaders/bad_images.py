"""What a loader does about images that cannot be decoded (`--on-bad-image`), the same for every loader."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from fastssl.data_prep.images import BadImage

MAX_BAD_RUN = 1000  # unreadable images in a row after which the data set, not an image, is broken


class BadImages:
    """Decodes images one at a time, remembers those that cannot be, and finds what takes their place.

    decode: maps an index to its pixels, (H, W, 3) uint8, or raises BadImage. policy: "skip" gives the place of an
    unreadable image to the next readable one in file order; "error" raises ValueError. Used from any thread.
    """

    def __init__(self, policy: str, num_images: int, decode: Callable[[int], np.ndarray]) -> None:
        self.policy, self.num_images, self.decoded = policy, num_images, 0
        self._decode = decode
        self._reasons: dict[int, str] = {}  # not the errors: their tracebacks would keep the files' bytes
        self._lock = threading.Lock()

    @property
    def messages(self) -> list[str]:
        """The unreadable images met so far, "path: reason": a list that only grows at its end."""
        return list(self._reasons.copy().values())

    def __contains__(self, index: int) -> bool:
        return index in self._reasons

    def count(self, images: int) -> None:
        """Counts images decoded elsewhere."""
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
                raise ValueError(
                    f"cannot decode {error}; mend the file, or let --on-bad-image skip pass over it"
                ) from error
            self._reasons[index] = str(error)
            return None
        self.count(1)
        return pixels

    def load_replacing(self, index: int) -> tuple[np.ndarray, int]:
        """The pixels for the place of image `index`, and the index they are of: its own or a replacement's."""
        tries = min(self.num_images, MAX_BAD_RUN)
        for i in range(index, index + tries):
            i %= self.num_images
            if (pixels := self.load(i)) is not None:
                return pixels, i
        raise ValueError(f"{tries} image files in a row cannot be decoded, beginning with {self._reasons[index]}")
