"""Decodes any image file to (H, W, 3) uint8 RGB, or raises a `BadImage` that says why not."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastssl.data_prep.rgb import to_rgb

MAX_PIXELS = 89_478_485  # 256 MB of RGB; Pillow's own limit for suspecting a decompression bomb

Image.init()  # now, because Pillow would do so at the first unknown file, which is not thread-safe
# Only these: Pillow would start Ghostscript for an EPS file.
_WANTED = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "PPM", "JPEG2000")
_FORMATS = [name for name in _WANTED if name in Image.OPEN]


class BadImage(ValueError):
    """An image file that cannot be decoded; `str()` gives "path: reason"."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path.encode("utf-8", "backslashreplace").decode()  # makes names that are not UTF-8 printable
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def decode_image(source: str | os.PathLike | bytes, name: str | None = None) -> np.ndarray:
    """Decodes one image, given as a path or as the bytes of a file, to an (H, W, 3) uint8 RGB array.

    The content decides the format, not the name. Greyscale is copied to all channels, 16-bit samples keep their high
    byte, transparent pixels are blended with white, EXIF orientation is applied, an animation gives its first frame.
    Raises BadImage (with `name`, or the path) when the file cannot be read, is truncated or not an image, or has more
    than MAX_PIXELS pixels.
    """
    return np.array(open_image(source, name))


def open_image(
    source: str | os.PathLike | bytes, name: str | None = None, look: Callable[[Image.Image], None] = lambda image: None
) -> Image.Image:
    """`decode_image` to a Pillow image in mode RGB; calls `look` with the opened file before its pixels are decoded."""
    name = name or ("<bytes>" if isinstance(source, bytes) else os.fspath(source))
    data = source if isinstance(source, bytes) else read_file(source, name)
    if not data:
        raise BadImage(name, "the file is empty")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(name, f"{image.width} x {image.height} is more than {MAX_PIXELS:,} pixels")
            look(image)
            return to_rgb(image)
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BadImage(name, f"not an image in a known format ({', '.join(_FORMATS)})") from None
    except Exception as error:  # a damaged file can make a decoder raise anything
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise BadImage(name, reason or type(error).__name__) from error


def read_file(path: str | os.PathLike, name: str, offset: int = 0, size: int = -1) -> bytes:
    """The bytes of a file, or `size` of them from `offset`. Raises BadImage, or OSError when memory has run out."""
    try:
        with open_file(path) as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise
        raise BadImage(name, error.strerror or str(error)) from None


def open_file(path: str | os.PathLike) -> BinaryIO:
    """Opens a file to read. Raises OSError for pipes and devices, from which reading may never end."""
    return open(path, "rb", opener=_open_regular)


def _open_regular(path: str, flags: int) -> int:
    handle = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file")
    return handle
