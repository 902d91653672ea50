"""Draws the two views of an image for a static view set, as the small-model project (arXiv 2107.14762) does.

Every view gets colour jitter (.4, .4, .4, .1) with probability .8, greyscale with .2, blur of sigma U(.1, 2) with .5
and a flip with .5. --aug says how the two crops are drawn:

  moco                    random crops of a fifth to all of the image
  nointer                 random crops of two different quadrants, which share nothing
  super-hard, hard, easy  two crops whose overlap / union is in a band, neither containing the other; each view is
                          written four more times, with the shared region under white noise, the same noise at a random
                          place, the shared region in the mean colour, and the same patch at a random place
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter
from torchvision import transforms

SIDE = 224  # pixels of a view
# Lowest and highest overlap / union, and how many pairs of crops are tried after the first.
BANDS = {"super-hard": (1e-4, 0.05, 2000), "hard": (0.05, 0.25, 1000), "easy": (0.25, 1.0, 1000)}
AUGS = ("moco", "nointer", *BANDS)
MEAN_COLOUR = (124, 116, 104)


class Box(NamedTuple):
    """A crop, in pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def bottom(self) -> int:
        return self.top + self.height

    @property
    def right(self) -> int:
        return self.left + self.width


def count_views(aug: str) -> int:
    """Number of files per image, besides the original."""
    return 10 if aug in BANDS else 2


def make_view_pair(image: Image.Image, aug: str, seed: int) -> tuple[list[Image.Image], bool]:
    """The 2 or 10 views of an RGB image, 224 x 224 and in file order, as a function of (image, aug, seed).

    Also returns whether the crops are in the band: if none of the tried pairs is, the last is used, as in the project.
    Raises ValueError for an unknown `aug`, and for an image too small to have quadrants.
    """
    with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's own generator
        torch.manual_seed(seed)
        if aug == "moco":
            crop = transforms.RandomResizedCrop(SIDE, scale=(0.2, 1.0))
            return [_flip(_recolour(crop(image))) for _ in range(2)], True
        if aug == "nointer":
            return _disjoint_views(image), True
        if aug in BANDS:
            return _banded_views(image, *BANDS[aug])
    raise ValueError(f"unknown --aug {aug!r}: choose one of {', '.join(AUGS)}")


def intersection_over_union(a: Box, b: Box) -> float:
    """Overlap / union, with an overlap one pixel taller and wider than it is, as in the project."""
    height = min(a.bottom, b.bottom) - max(a.top, b.top) + 1
    width = min(a.right, b.right) - max(a.left, b.left) + 1
    overlap = max(0, height) * max(0, width)
    union = a.height * a.width + b.height * b.width - overlap
    return overlap / max(1, union)  # of crops two pixels wide, so large an overlap may leave none


def contains(a: Box, b: Box) -> bool:
    """Whether a contains all of b."""
    return a.top <= b.top and a.left <= b.left and a.bottom >= b.bottom and a.right >= b.right


def shared_region(box: Box, other: Box) -> Box | None:
    """The part of the 224 x 224 view of `box` that shows pixels of `other` too; None if there is no such part."""
    top, left = max(box.top, other.top), max(box.left, other.left)
    height, width = min(box.bottom, other.bottom) - top, min(box.right, other.right) - left
    if height < 0 or width < 0:
        return None
    return Box(
        int((top - box.top) / box.height * SIDE),
        int((left - box.left) / box.width * SIDE),
        max(int((height + 1) / (box.height + 1) * SIDE), 1),
        max(int((width + 1) / (box.width + 1) * SIDE), 1),
    )


def _banded_views(image: Image.Image, low: float, high: float, tries: int) -> tuple[list[Image.Image], bool]:
    in_band = False
    for _ in range(tries + 1):
        a, b = _random_box(image), _random_box(image)
        in_band = low <= intersection_over_union(a, b) <= high and not contains(a, b) and not contains(b, a)
        if in_band:
            break
    views_a, views_b = _with_masks(image, a, b), _with_masks(image, b, a)
    return [view for pair in zip(views_a, views_b) for view in pair], in_band


def _with_masks(image: Image.Image, box: Box, other: Box) -> list[Image.Image]:
    """One view five times: unmasked; shared region in noise, noise elsewhere; the same two with the mean colour."""
    view = _recolour(TF.resized_crop(image, *box, size=[SIDE, SIDE]))
    views, region = [view], shared_region(box, other)
    for noise in (True, False):
        if region is None:
            views += [view, view]
            continue
        size = (region.height, region.width, 3)
        patch = torch.randint(0, 255, size).numpy() if noise else np.broadcast_to(MEAN_COLOUR, size)
        elsewhere = (_integer(SIDE - min(region.height, SIDE)), _integer(SIDE - min(region.width, SIDE)))
        views += [_paste(view, patch, region.top, region.left), _paste(view, patch, *elsewhere)]
    return [TF.hflip(v) for v in views] if _integer(1) else views


def _paste(view: Image.Image, patch: np.ndarray, top: int, left: int) -> Image.Image:
    result = view.copy()
    result.paste(Image.fromarray(patch.astype(np.uint8)), (left, top))
    return result


def _disjoint_views(image: Image.Image) -> list[Image.Image]:
    height, width = image.height // 2, image.width // 2
    if min(height, width) < 1:
        raise ValueError(f"{image.width} x {image.height} pixels are too few for quadrants")
    corners = [(top, left) for top in (0, image.height - height) for left in (0, image.width - width)]
    crop = transforms.RandomResizedCrop(SIDE, scale=(0.4, 1.0))
    chosen = [corners[i] for i in torch.randperm(4)[:2]]
    return [_flip(_recolour(crop(TF.crop(image, *corner, height, width)))) for corner in chosen]


def _random_box(image: Image.Image) -> Box:
    """A crop of a fifth to all of the area with a ratio of 3:4 to 4:3; a central one if none of 20 tries fits."""
    width, height = image.size
    ratio = (0.75, 4 / 3)
    for _ in range(20):
        area = height * width * _uniform(0.2, 1.0)
        aspect = math.exp(_uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Box(_integer(height - h), _integer(width - w), h, w)
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def _recolour(view: Image.Image) -> Image.Image:
    if _uniform(0, 1) < 0.8:
        view = transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)(view)
    if _uniform(0, 1) < 0.2:
        view = TF.to_grayscale(view, num_output_channels=3)
    if _uniform(0, 1) < 0.5:
        view = view.filter(ImageFilter.GaussianBlur(_uniform(0.1, 2.0)))
    return view


def _flip(view: Image.Image) -> Image.Image:
    return TF.hflip(view) if _integer(1) else view


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _integer(most: int) -> int:
    """A random integer from 0 to `most`, inclusive."""
    return int(torch.randint(0, most + 1, ()))
