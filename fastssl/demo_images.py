"""Draws ten classes of striped pictures, so that the demo needs no download.

A class is a direction of the stripes (one of five, up to a mirror image) and a spacing (one of two). Everything else
(colours, brightness, position and width of the stripes, soft patches, bends, noise) is random in each picture. So
neither pixels nor colour statistics tell the class, which is most of what the two views of a picture have in common.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from fastssl.random_key import STREAM_DEMO, derive_seed

_OVERSAMPLE = 2  # pictures are drawn this much larger and averaged down, which antialiases the edges
_LUMA = np.array([0.299, 0.587, 0.114])
CLASSES = {  # class: degrees from upright, stripes across the picture
    f"{angle:02d}-degrees-{spacing}": (angle, stripes)
    for angle in (0, 22, 45, 68, 90)
    for spacing, stripes in (("wide", 5.0), ("narrow", 10.0))
}


def draw_picture(name: str, rng: np.random.Generator, size: int) -> np.ndarray:
    """One (size, size, 3) uint8 picture of class `name`; everything else about it is drawn from `rng`."""
    side = size * _OVERSAMPLE
    stripes = _draw_stripes(*CLASSES[name], rng, side)[..., None]
    back, front = _two_brightnesses(rng)
    picture = _clouds(rng, side, front) * stripes + _clouds(rng, side, back) * (1 - stripes)
    picture = picture.reshape(size, _OVERSAMPLE, size, _OVERSAMPLE, 3).mean(axis=(1, 3))
    return np.clip(picture + rng.normal(0, 18, size=picture.shape), 0, 255).astype(np.uint8)


def _draw_stripes(angle: float, stripes: float, rng: np.random.Generator, side: int) -> np.ndarray:
    """(side, side) in [0, 1]: 1 on a stripe."""
    y, x = np.mgrid[:side, :side] / side - 0.5
    tilt = np.radians(angle + rng.uniform(-6, 6)) * rng.choice([-1, 1])
    across, along = x * np.cos(tilt) + y * np.sin(tilt), y * np.cos(tilt) - x * np.sin(tilt)
    across = across + rng.normal(0, 0.02) * np.sin(2 * np.pi * (along * rng.uniform(0.5, 1.5) + rng.uniform()))
    wave = np.cos(2 * np.pi * (across * stripes * np.exp(rng.uniform(-0.12, 0.12)) + rng.uniform()))
    return 1 / (1 + np.exp(-6 * (wave - rng.uniform(-0.4, 0.4))))


def _two_brightnesses(rng: np.random.Generator) -> np.ndarray:
    """Brightness of background and stripes in [0, 1], far enough apart to be told from each other in grey."""
    while True:
        pair = rng.uniform(0.1, 0.9, size=2)
        if abs(pair[0] - pair[1]) > 0.25:
            return pair


def _clouds(rng: np.random.Generator, side: int, brightness: float) -> np.ndarray:
    """(side, side, 3) in 0..255: one random colour of this brightness, with soft patches."""
    cells = int(rng.integers(2, 5))
    colour = rng.uniform(0, 1, size=3) + rng.normal(0, 0.2, size=(cells, cells, 3))
    wanted = brightness + rng.normal(0, 0.1, size=(cells, cells))
    colour = np.clip(colour + (wanted - colour @ _LUMA)[..., None], 0, 1)
    picture = Image.fromarray((255 * colour).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(picture, dtype=np.float32)


def write_demo_images(folder: Path, seed: int, train: int, val: int, size: int = 48) -> None:
    """Writes `train` pictures to folder/train/<class>/*.jpg and `val` to folder/val/<class>/*.jpg, balanced by class.

    They are a function of the seed. `folder` appears only when it is complete.
    """
    partial = folder.with_name(folder.name + ".partial")
    for split, number in (("train", train), ("val", val)):
        for i in range(number):
            name = list(CLASSES)[i % len(CLASSES)]
            rng = np.random.default_rng(derive_seed(seed, int(split == "val"), STREAM_DEMO, i))
            (partial / split / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw_picture(name, rng, size)).save(partial / split / name / f"{i:05d}.jpg", quality=90)
    os.replace(partial, folder)
