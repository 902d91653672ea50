"""Draws small data sets to check loaders with: of ordinary, of odd and of unreadable images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from fastssl.loaders.beton_file import open_beton

FOLDER_LOADERS = ("folder", "dali")  # what else reads files is given a .beton file
BAD = (3, 4, 11)  # the unreadable images of `make_bad`: two in a row and the last
NUM_BAD_SET = 12


def reads_files(loader: str) -> bool:
    """Whether this loader reads files at all."""
    return loader != "synthetic"


def make_good(loader: str, root: Path, count: int = 26) -> Path | None:
    """`count` ordinary JPEGs in three classes, in the form that `loader` reads; None if it reads nothing."""
    for i in range(count):
        folder = root / "good" / f"class{i * 3 // count}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(_pixels(i)).save(folder / f"{i:03d}.jpg", quality=90, subsampling=i % 3)
    return _as_kind(loader, root / "good")


def make_odd(loader: str, root: Path) -> Path | None:
    """One image of every kind that decoders treat differently."""
    folder = root / "odd"
    folder.mkdir()
    picture = Image.fromarray(_pixels(40, 45, 61))
    turned = Image.Exif()
    turned[0x0112] = 6
    for name, image, options in [
        ("plain.jpg", picture, {}),
        ("444.jpg", picture, {"subsampling": 0}),
        ("422.jpg", picture, {"subsampling": 1}),
        ("progressive.jpg", picture, {"progressive": True}),
        ("restart.jpg", picture, {"restart_marker_rows": 1}),
        ("turned.jpg", picture, {"exif": turned}),
        ("grey.jpg", picture.convert("L"), {}),
        ("cmyk.jpg", picture.convert("CMYK"), {}),
        ("rgb.jpg", picture, {"keep_rgb": True}),
        ("line.jpg", picture.crop((0, 0, 1, 45)), {}),
        ("dot.jpg", picture.crop((0, 0, 1, 1)), {}),
        ("colour.png", picture, {}),
        ("palette.png", picture.convert("P"), {}),
        ("clear.png", picture.convert("RGBA"), {}),
        ("16-bit.png", Image.fromarray(_pixels(40, 45, 61)[..., 0].astype(np.uint16) * 257), {}),
        ("still.gif", picture, {}),
        ("bitmap.bmp", picture, {}),
    ]:
        image.save(folder / name, **options)
    (folder / "png.jpg").write_bytes((folder / "colour.png").read_bytes())
    return _as_kind(loader, folder)


def make_bad(loader: str, root: Path) -> Path | None:
    """NUM_BAD_SET images, of which those in BAD cannot be decoded: empty, truncated, and not an image."""
    folder = root / "bad"
    folder.mkdir()
    for i in range(NUM_BAD_SET):
        Image.fromarray(_pixels(i)).save(folder / f"{i:03d}.jpg")
    path = _as_kind(loader, folder)
    if path == folder:
        whole = (folder / f"{BAD[1]:03d}.jpg").read_bytes()
        for i, content in zip(BAD, (b"", whole[: len(whole) // 2], b"no image")):
            (folder / f"{i:03d}.jpg").write_bytes(content)
    elif path is not None:
        beton = open_beton(path)
        places = [(int(beton.pointer[i]), int(beton.size[i])) for i in BAD]
        with open(path, "r+b") as file:
            for start, size in places:
                file.seek(start)
                file.write(bytes(size))
    return path


def _pixels(i: int, height: int | None = None, width: int | None = None) -> np.ndarray:
    """Image i, (H, W, 3) uint8: a smooth picture with some noise, and sides from 24 to 60 that depend on i."""
    random = np.random.default_rng(i)
    height, width = height or 24 + i * 7 % 37, width or 24 + i * 11 % 37
    coarse = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((width, height))
    return np.clip(np.asarray(coarse) + random.normal(0, 8, (height, width, 3)), 0, 255).astype(np.uint8)


def _as_kind(loader: str, folder: Path) -> Path | None:
    """The folder in the form that `loader` reads."""
    if not reads_files(loader):
        return None
    if loader in FOLDER_LOADERS:
        return folder
    from fastssl.data_prep.prepare import Store
    from fastssl.data_prep.sources import Selection
    from fastssl.data_prep.work_pool import Work
    from fastssl.data_prep.write_beton import write_beton

    path = folder.with_suffix(".beton")
    write_beton(folder, path, Store(originals=True), Selection(), Work(workers=1))
    return path
