"""Writes .beton files by FFCV's own DatasetWriter, in a process of its own: importing ffcv changes torch's threads.

python ffcv_writer.py FOLDER, which holds photos.npz: one file for each mode, and one with fields of many kinds.
"""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

import numpy as np

MODES = {  # name -> options of RGBImageField
    "jpg": {"write_mode": "jpg", "jpeg_quality": 95},
    "raw": {"write_mode": "raw"},
    "proportion": {"write_mode": "proportion", "compress_probability": 0.5},
    "smart": {"write_mode": "smart", "smart_threshold": 7800},
}


class Photos:
    """Sample i as a tuple: image, label and, for many fields, more."""

    def __init__(self, images: list[np.ndarray], many: bool) -> None:
        self.images, self.many = images, many

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple:
        image, label = self.images[i], i % 3
        if not self.many:
            return image, label
        return i * 0.5, np.full(3, i, "<f4"), label, np.arange(5, dtype="u1"), image, {"place": int(i)}, 7


def main(folder: Path) -> None:
    """Writes FOLDER/<mode>.beton for every mode, and FOLDER/many.beton."""
    multiprocessing.set_start_method("fork")  # no longer Python's default, but FFCV counts on it
    import cv2
    from ffcv.fields import BytesField, FloatField, IntField, JSONField, NDArrayField, RGBImageField
    from ffcv.writer import DatasetWriter

    cv2.setNumThreads(0)  # its threads do not outlive the fork of the writer's worker
    with np.load(folder / "photos.npz") as file:
        images = [file[name] for name in file.files]
    np.random.seed(1)  # of proportion
    files = {name: {"image": RGBImageField(**options), "label": IntField()} for name, options in MODES.items()}
    files["many"] = {
        "half": FloatField(),
        "vector": NDArrayField(np.dtype("<f4"), (3,)),
        "label": IntField(),
        "words": BytesField(),
        "photo": RGBImageField(write_mode="jpg"),
        "facts": JSONField(),
        "other": IntField(),
    }
    for name, fields in files.items():
        writer = DatasetWriter(str(folder / f"{name}.beton"), fields, num_workers=1)
        writer.from_indexed_dataset(Photos(images, name == "many"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
