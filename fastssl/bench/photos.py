"""Images for the benchmarks: JPEGs cut from the two photographs in scikit-learn, and a .beton of any folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from fastssl.data_prep.find import has_train_split
from fastssl.data_prep.manifest import described, listing_path, read_manifest
from fastssl.data_prep.prepare import Store
from fastssl.data_prep.sources import Selection, open_source
from fastssl.data_prep.work_pool import Work
from fastssl.data_prep.write_beton import write_beton
from fastssl.loaders.beton_file import open_beton
from fastssl.machine.limits import usable_cores
from fastssl.plural import counted

CLASSES = 8
SOURCE = "photographs cut from scikit-learn's two"


def write_photos(folder: Path, count: int, sides: tuple[int, int] = (375, 500)) -> None:
    """Writes folder/train/<class>/*.jpg, `count` in all, at quality 90, landscape and portrait, all different.

    They are real photographs, because drawn pictures do not take as long to decode. sides: (short, long), in pixels.
    """
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]  # 640 x 427 each
    random = np.random.default_rng(0)
    for i in range(count):
        photograph = photographs[i % len(photographs)]
        height = random.uniform(0.5, 1.0) * photograph.height
        width = height * sides[1] / sides[0]
        scale = min(1.0, photograph.width / width)
        width, height = width * scale, height * scale
        left, top = random.uniform(0, photograph.width - width), random.uniform(0, photograph.height - height)
        box = (left, top, left + width, top + height)
        picture = photograph.resize((sides[1], sides[0]), Image.Resampling.BICUBIC, box)
        picture = picture.rotate(90, expand=True) if random.random() < 0.25 else picture
        target = folder / "train" / f"class{i % CLASSES}" / f"{i:05d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        picture.save(target, quality=90)


def train_folder(data: str) -> str:
    """The folder that holds the class folders: data/train if that is the training split, else data itself.

    Raises ValueError if data is not a folder.
    """
    if not os.path.isdir(data):
        raise ValueError(f"{data} is not a folder: give one with JPEGs in <class>/ or train/<class>/")
    return os.path.join(data, "train") if has_train_split(data) else data


def open_data(data: str | None, beton: str | None, scratch: Path, count: int) -> tuple[str, str]:
    """(folder, .beton) of the same files. What is not given is made in `scratch`, from `count` photographs.

    Of a .beton alone no folder is made: its path stands for both, and what needs a folder refuses it. Raises ValueError
    for two that differ.
    """
    if data is None and beton is not None:
        return beton, beton
    if data is None:
        data = str(scratch / "photos")
        write_photos(scratch / "photos", count)
    if beton is None:
        beton = str(scratch / "images.beton")
        write_beton(data, beton, Store(originals=True), Selection(), Work(usable_cores()))
    else:
        check_same_images(data, beton)
    return data, beton


def check_same_images(data: str, beton: str) -> None:
    """Raises ValueError unless a .beton holds the images of a folder, but for those that its manifest says it left out.

    Compared are their number and, with a listing, their names, but for the extension: a folder may hold the images as
    JPEGs of another size. Images of tar files have other names than those of folders.
    """
    mend = "the rates would not be of the same images; fastssl prep beton makes such a file of a folder"
    manifest = read_manifest(Path(beton)) or {"quarantined": []}
    left_out = {line["path"] for line in manifest["quarantined"]}
    names = [name for name in open_source(data, Selection()).folder.paths if name not in left_out]
    if (held := len(open_beton(beton))) != len(names):
        raise ValueError(f"{beton} holds {counted(held, 'image')}, and {data} {len(names):,}: {mend}")
    if not (listing := listing_path(described(Path(beton)))).exists():
        return
    stored = [json.loads(line)["path"] for line in listing.read_text("ascii").splitlines()]
    for theirs, ours in zip(stored, names):
        if os.path.splitext(theirs)[0] != os.path.splitext(ours)[0] and ".tar/" not in theirs + ours:
            raise ValueError(f"{beton} holds {theirs}, and {data} has {ours} in its place: {mend}")
