"""Ten classes of pictures that only shape tells apart, drawn here so that the demo needs no download.

Each picture is one shape over a cloudy background with a few stray lines. Colours, which of shape and background is
the lighter, place, size and tilt are drawn for the picture, none of them depends on the class, and all shapes cover
the same area: so pixels and colours tell little about the class, and an encoder has to learn to look past them.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fastssl.random_key import derive_seed

STREAM_DEMO = 21  # of random_key: pictures
_OVERSAMPLE = 2  # drawn so much larger and averaged down, which smooths the edges
_LUMA = np.array([0.299, 0.587, 0.114])


def _arc(radius: float, start: float, stop: float, num: int, x: float = 0.0) -> np.ndarray:
    """`num` points of a circle around (x, 0) from `start` to `stop` degrees, (num, 2)."""
    angle = np.radians(np.linspace(start, stop, num))
    return np.stack([x + radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _spokes(radii: list[float]) -> np.ndarray:
    """Corners at these radii and equal angles, the first pointing up, (n, 2)."""
    angle = np.arange(len(radii)) * (2 * np.pi / len(radii)) - np.pi / 2
    return np.stack([radii * np.cos(angle), radii * np.sin(angle)], axis=1)


def _heart(num: int = 40) -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, num, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y], axis=1)


def _unit_area(outline: np.ndarray) -> np.ndarray:
    """The polygon (V, 2) around its centroid, of area 1 (shoelace formula)."""
    (x, y), (x1, y1) = outline.T, np.roll(outline, -1, axis=0).T
    cross = x * y1 - x1 * y
    area = cross.sum() / 2
    centroid = np.array([((x + x1) * cross).sum(), ((y + y1) * cross).sum()]) / (6 * area)
    return (outline - centroid) / np.sqrt(abs(area))


_CROSS = [(1, 3), (1, 1), (3, 1), (3, -1), (1, -1), (1, -3), (-1, -3), (-1, -1), (-3, -1), (-3, 1), (-1, 1), (-1, 3)]
_ARROW = [(0, -3), (2.4, 0), (0.8, 0), (0.8, 3), (-0.8, 3), (-0.8, 0), (-2.4, 0)]
_BOLT = [(-3, -2), (1.2, -2), (0.4, -0.6), (3, -0.6), (3, 2), (-1.2, 2), (-0.4, 0.6), (-3, 0.6)]
SHAPES = {  # class: outline, (V, 2) corners
    name: _unit_area(np.asarray(outline, dtype=float))
    for name, outline in {
        "arrow": _ARROW,
        "bolt": _BOLT,
        "crescent": np.concatenate([_arc(1, 50, 310, 30), _arc(0.82, 291, 69, 24, x=0.35)]),
        "cross": _CROSS,
        "disc": _arc(1, 0, 351, 40),
        "heart": _heart(),
        "ring": np.concatenate([_arc(1, 0, 360, 40), _arc(0.55, 360, 0, 30)]),
        "square": _spokes([1.0] * 4) @ np.array([[1, 1], [-1, 1]]),
        "star": _spokes([1.0, 0.42] * 5),
        "triangle": _spokes([1.0] * 3),
    }.items()
}


def draw_picture(shape: str, rng: np.random.Generator, size: int) -> np.ndarray:
    """One (size, size, 3) uint8 picture of `shape`, everything else drawn from `rng`."""
    side = size * _OVERSAMPLE
    back, front = _two_brightnesses(rng)
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).polygon(_place(SHAPES[shape], rng, side), fill=255)
    picture = Image.composite(_clouds(rng, side, front), _clouds(rng, side, back), mask)
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(0, 4)):
        colour = tuple(rng.integers(0, 256, size=3).tolist())
        draw.line(rng.uniform(0, side, size=4).tolist(), fill=colour, width=int(rng.integers(1, 2 * _OVERSAMPLE + 1)))
    pixels = np.asarray(picture.reduce(_OVERSAMPLE), dtype=np.float32)
    return np.clip(pixels + rng.normal(0, 6, size=pixels.shape), 0, 255).astype(np.uint8)


def _two_brightnesses(rng: np.random.Generator) -> np.ndarray:
    """Brightness of background and shape in [0, 1], far enough apart to see the shape in grey."""
    while True:
        pair = rng.uniform(0.1, 0.9, size=2)
        if abs(pair[0] - pair[1]) > 0.25:
            return pair


def _place(outline: np.ndarray, rng: np.random.Generator, side: int) -> list[tuple[float, float]]:
    """The outline's corners tilted, scaled and moved, in pixels."""
    angle = np.radians(rng.uniform(-30, 30))
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    centre = rng.uniform(0.4, 0.6, size=2)
    return [tuple(corner) for corner in (outline @ turn * rng.uniform(0.42, 0.58) + centre) * side]


def _clouds(rng: np.random.Generator, side: int, brightness: float) -> Image.Image:
    """A (side, side) picture of one random colour of this brightness, with soft patches."""
    cells = int(rng.integers(2, 5))
    colour = rng.uniform(0, 1, size=3) + rng.normal(0, 0.1, size=(cells, cells, 3))
    wanted = brightness + rng.normal(0, 0.06, size=(cells, cells))
    colour = np.clip(colour + (wanted - colour @ _LUMA)[..., None], 0, 1)
    return Image.fromarray((255 * colour).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)


def write_demo_images(folder: Path, seed: int, train: int = 3000, val: int = 500, size: int = 64) -> None:
    """Writes folder/train/<class>/*.jpg and folder/val/<class>/*.jpg: so many pictures in all, equally many a class.

    The same for the same seed. `folder` appears when it is complete.
    """
    partial = folder.with_name(folder.name + ".partial")
    for split, number in (("train", train), ("val", val)):
        for i in range(number):
            shape = list(SHAPES)[i % len(SHAPES)]
            rng = np.random.default_rng(derive_seed(seed, int(split == "val"), STREAM_DEMO, i))
            (partial / split / shape).mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw_picture(shape, rng, size)).save(partial / split / shape / f"{i:05d}.jpg", quality=90)
    os.replace(partial, folder)
