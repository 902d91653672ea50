"""Finds image files, and decodes any of them to (H, W, 3) uint8 RGB or raises a `BadImage` that says why not."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastssl.data_prep.rgb import to_rgb
from fastssl.plural import counted

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
MAX_PIXELS = 89_478_485  # 256 MB of RGB; Pillow's own limit for suspecting a decompression bomb

Image.init()  # now, because Pillow would do so at the first unknown file, which is not thread-safe
# Only these: Pillow would start Ghostscript for an EPS file.
_FORMATS = [f for f in ("JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM") if f in Image.OPEN]
_SPLITS = ("train", "val", "valid", "validation", "test", "dev", "eval")


class BadImage(ValueError):
    """An image file that cannot be decoded; `str()` gives "path: reason"."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path.encode("utf-8", "backslashreplace").decode()  # makes names that are not UTF-8 printable
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class ImageFolder(NamedTuple):
    """A list of image files, in the same order on every machine."""

    root: str  # the folder that contains all of them
    paths: list[str]  # relative to root, sorted by their parts between "/"
    labels: np.ndarray  # (n,) int64, -1 everywhere when there are no classes
    class_names: list[str]  # sorted; empty for a flat folder

    def path(self, i: int) -> str:
        """The full path of file i."""
        return os.path.join(self.root, self.paths[i])


def find_images(root: str | os.PathLike, class_names: Sequence[str] | None = None) -> ImageFolder:
    """Lists the images of `root/train/<class>/*`, of `root/<class>/*`, or of a flat folder.

    Folders are searched to any depth and links are followed; an image's class is its first folder below the base. A
    base that directly holds images is flat: it has no classes, though images in its folders count too. Files are chosen
    by extension; hidden ones (`.name`) are ignored. `class_names`: those of another split, to number the labels alike.
    Raises ValueError when there is no folder, no image, or a class that is not in `class_names`.
    """
    root = os.fspath(root)
    if not os.path.isdir(root):
        what = "is a file, not a folder" if os.path.exists(root) else "does not exist"
        raise ValueError(f"{root} {what}: give a folder that holds images, <class>/ folders or train/<class>/ folders")
    try:
        base = os.path.join(root, "train") if has_train_split(root) else root
        paths = sorted(walk_images(base), key=lambda path: path.split("/"))
    except OSError as error:
        raise ValueError(f"cannot read the folder {error.filename}: {error.strerror}") from error
    if not paths:
        raise ValueError(
            f"{base} holds no images ({_inventory(base)}): give a folder that holds images, <class>/ folders or "
            f"train/<class>/ folders, with files named {' '.join(EXTENSIONS)}"
        )
    return label_by_folder(base, paths, class_names)


def label_by_folder(base: str, paths: list[str], class_names: Sequence[str] | None = None) -> ImageFolder:
    """The files `paths` (sorted) below `base`, labelled by their first folders; unlabelled if any of them has none."""
    tops = [path.split("/", 1)[0] if "/" in path else None for path in paths]
    if None in tops:
        return ImageFolder(base, paths, np.full(len(paths), -1, dtype=np.int64), [])
    names = list(class_names) if class_names else sorted(set(tops))
    number = {name: i for i, name in enumerate(names)}
    if unknown := sorted(set(tops) - set(names)):
        known = counted(len(names), "class", "classes")
        raise ValueError(f"{base} has a class {unknown[0]!r} that is not among the {known} of the other split")
    return ImageFolder(base, paths, np.array([number[top] for top in tops], dtype=np.int64), names)


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


def has_train_split(root: str) -> bool:
    """Whether root/train is the training split, and not one class among others (as in CIFAR-100)."""
    if not os.path.isdir(os.path.join(root, "train")):
        return False
    if not _holds_images(os.path.join(root, "train")):
        return True
    others = [os.path.join(root, name) for name in os.listdir(root) if name not in _SPLITS]
    return not any(os.path.isdir(path) and _holds_images(path) for path in others)


def _holds_images(folder: str) -> bool:
    return any(map(is_image_name, os.listdir(folder)))


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return not name.startswith(".") and name.lower().endswith(EXTENSIONS)


def walk_images(folder: str, prefix: str = "", above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """Relative paths of the images in a folder and below it, without following links back to a folder above."""
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in above:
        return
    above = above | {(status.st_dev, status.st_ino)}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                yield from walk_images(entry.path, f"{prefix}{entry.name}/", above)
            elif is_image_name(entry.name):
                yield prefix + entry.name


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself is treated as an unreadable file
        return False


def _inventory(folder: str) -> str:
    """What a folder without images holds, in a few words."""
    files, folders = Counter(), 0
    for _, folder_names, file_names in os.walk(folder):
        folders += len(folder_names)
        files.update((os.path.splitext(name)[1] or "no-extension") + " file" for name in file_names)
    kinds = files.most_common(3) + ([("folder", folders)] if folders else [])
    found = ", ".join(counted(number, kind) for kind, number in kinds)
    return f"only {found}" if found else "it is empty"
