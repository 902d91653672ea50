"""Images for the benchmarks: JPEGs cut from the two photographs in scikit-learn, and a .beton of any folder."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from fastssl.data_prep.find import has_train_split
from fastssl.data_prep.prepare import Store
from fastssl.data_prep.sources import Selection
from fastssl.data_prep.work_pool import Work
from fastssl.data_prep.write_beton import write_beton
from fastssl.limits import usable_cores

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
    """(folder, .beton) of the same files. What is not given is made in `scratch`, from `count` photographs."""
    if data is None:
        data = str(scratch / "photos")
        write_photos(scratch / "photos", count)
    if beton is None:
        beton = str(scratch / "images.beton")
        write_beton(data, beton, Store(originals=True), Selection(), Work(usable_cores()))
    return data, beton
