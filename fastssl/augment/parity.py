"""Measures how far our operations are from Pillow's and torchvision's, in units of 1/255."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from fastssl.augment.blur import gaussian_taps, update_blur
from fastssl.augment.color import (
    update_brightness,
    update_contrast,
    update_greyscale,
    update_hue,
    update_saturation,
    update_solarise,
)
from fastssl.augment.normalise import MEAN, STD
from fastssl.augment.params import ViewParams, sample_params
from fastssl.augment.policy import make_policy
from fastssl.augment.resample import crop_axes, resample_reference
from fastssl.augment.resize import crop_resize
from fastssl.augment.views import make_view
from fastssl.batch import ImageBatch

FACTORS = (0.2, 0.6, 0.9, 1.1, 1.4, 2.2)
TURNS = (-0.5, -0.4, -0.1, -0.02, 0.02, 0.1, 0.4, 0.5)
SIGMAS = (0.1, 0.5, 1.0, 1.5, 2.0)
NAMES = ("brightness", "contrast", "saturation", "hue")


class Row(NamedTuple):
    """A line of the table; an infinite bound means none."""

    name: str
    mean: float
    max: float
    mean_bound: float = math.inf
    max_bound: float = math.inf

    @property
    def holds(self) -> bool:
        """Whether both errors are within their bounds."""
        return self.mean <= self.mean_bound and self.max <= self.max_bound


def operation_rows(batch: ImageBatch, size: int) -> Iterator[Row]:
    """Errors of each operation alone, with fixed parameters, on crops of `size` pixels of the batch's pictures."""
    p = sample_params(make_policy("v2"), batch, 0, 0, 0)
    yield _row("resized crop", _resize_errors(batch, p, size, crop_resize(batch, p, size)), 0.3, 1)
    exact = resample_reference(batch, *crop_axes(p, size), size)
    exact = torch.where(p.flip.view(-1, 1, 1, 1), exact.flip(3), exact)
    yield _row("resized crop, as on a GPU", _resize_errors(batch, p, size, exact), 0.3, 1)
    pictures = [view.permute(1, 2, 0).numpy() for view in crop_resize(batch, p, size)]
    blends = (update_brightness, F.adjust_brightness), (update_contrast, F.adjust_contrast)
    for ours, theirs in (*blends, (update_saturation, F.adjust_saturation)):
        name = theirs.__name__.removeprefix("adjust_")
        yield _row(name, [_error(ours, theirs, x, f) for x in pictures for f in FACTORS], 1, 1)
    turned = [(x, t) for x in pictures for t in TURNS]
    pairs = [(updated(update_hue, x, t), _as_array(F.adjust_hue(Image.fromarray(x), t))) for x, t in turned]
    yield _row("hue, in 1/255 of the circle", [_hue_distance(a, b) for a, b in pairs], 0.3, 2)
    yield _row("hue, channels", [np.abs(a - b) for a, b in pairs], 0.3)
    greys = [(updated(update_greyscale, x), _as_array(F.rgb_to_grayscale(Image.fromarray(x), 3))) for x in pictures]
    yield _row("greyscale", [np.abs(a - b) for a, b in greys], 0, 0)
    inverted = [(updated(update_solarise, x), _as_array(F.solarize(Image.fromarray(x), 128))) for x in pictures]
    yield _row("solarise", [np.abs(a - b) for a, b in inverted], 0, 0)
    blurred = [(x, s, true_gaussian(x, s)) for x in pictures for s in SIGMAS]
    ours = [np.abs(updated(update_blur, x, taps=gaussian_taps(torch.tensor([s]))) - truth) for x, s, truth in blurred]
    yield _row("blur, against a true gaussian", ours, 0.5, 1)
    boxes = [_as_array(Image.fromarray(x).filter(ImageFilter.GaussianBlur(s))) - truth for x, s, truth in blurred]
    yield _row("  (Pillow's boxes against it)", [np.abs(error) for error in boxes])


def chain_rows(batch: ImageBatch, size: int, names: Sequence[str]) -> Iterator[Row]:
    """Errors of whole policies against the same chain of Pillow and torchvision, in which small errors may grow."""
    for name in names:
        p = sample_params(make_policy(name), batch, 0, 0, 1)
        ours = in_bytes(make_view(batch, p, size))
        errors = [np.abs(ours[i] - pillow_chain(batch.image(i).numpy(), p, i, size)) for i in range(batch.size)]
        yield _row(f"whole chain, {name}", errors, 0.5)
        yield _row("  (all but its worst 1 %)", [np.minimum(e, np.quantile(e, 0.99)) for e in errors], 0.5, 8)


def pillow_chain(image: np.ndarray, p: ViewParams, i: int, size: int) -> np.ndarray:
    """Applies `p` to image i with Pillow, torchvision and a true Gaussian: (size, size, 3) in 0..255."""
    view = pillow_crop(image, p, i, size)
    view = F.rgb_to_grayscale(view, 3) if p.grey_before[i] else view
    if p.jitter[i]:
        for number in list(itertools.permutations(range(4)))[int(p.order[i])]:
            view = getattr(F, f"adjust_{NAMES[number]}")(view, float(getattr(p, NAMES[number])[i]))
    view = F.rgb_to_grayscale(view, 3) if p.grey_after[i] else view
    pixels = _as_array(view).astype(np.float64)
    pixels = np.round(true_gaussian(pixels, float(p.sigma[i]))) if p.blur[i] else pixels
    return np.where((pixels >= 128) & bool(p.solarise[i]), 255 - pixels, pixels)


def pillow_crop(image: np.ndarray, p: ViewParams, i: int, size: int) -> Image.Image:
    """The crop of image i, flipped if `p` says so, by torchvision on Pillow's image."""
    box = (int(side[i]) for side in (p.top, p.left, p.crop_height, p.crop_width))
    view = F.resized_crop(Image.fromarray(image), *box, [size, size])
    return F.horizontal_flip(view) if p.flip[i] else view


def true_gaussian(image: np.ndarray, sigma: float) -> np.ndarray:
    """(H, W, 3) -> float64, blurred with taps up to 8 sigma and repeated edges."""
    radius = max(1, math.ceil(8 * sigma))
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    x = np.pad(image.astype(np.float64), ((radius, radius), (radius, radius), (0, 0)), mode="edge")
    for axis in (0, 1):
        length = x.shape[axis] - 2 * radius
        x = sum(np.take(x, range(k, k + length), axis) * tap for k, tap in enumerate(taps / taps.sum()))
    return x


def in_bytes(view: Tensor) -> np.ndarray:
    """(B, 3, S, S) normalised -> (B, S, S, 3) in 0..255, float64."""
    return (view.double().permute(0, 2, 3, 1).numpy() * STD + MEAN) * 255


def updated(update: Callable[..., None], image: np.ndarray, *params: float, taps: Tensor | None = None) -> np.ndarray:
    """Applies one of our operations to an (H, W, 3) picture; returns (H, W, 3) int64."""
    x = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float().contiguous()
    update(x, *([torch.tensor([value]) for value in params] if taps is None else [taps]))
    return x[0].permute(1, 2, 0).numpy().astype(np.int64)


def _row(name: str, errors: Sequence[np.ndarray], mean_bound: float = math.inf, max_bound: float = math.inf) -> Row:
    flat = np.concatenate([np.ravel(error) for error in errors])
    return Row(name, float(flat.mean()) if len(flat) else 0, float(flat.max(initial=0)), mean_bound, max_bound)


def _as_array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(np.int64)


def _error(ours: Callable[..., None], theirs: Callable, picture: np.ndarray, value: float) -> np.ndarray:
    return np.abs(updated(ours, picture, value) - _as_array(theirs(Image.fromarray(picture), value)))


def _resize_errors(batch: ImageBatch, p: ViewParams, size: int, views: Tensor) -> list[np.ndarray]:
    crops = [_as_array(pillow_crop(batch.image(i).numpy(), p, i, size)) for i in range(batch.size)]
    return [np.abs(view.permute(1, 2, 0).numpy() - crop) for view, crop in zip(views, crops)]


def _hue_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distances of hues in 1/255 turn, for pixels with enough colour to have one (max - min above 100)."""
    (hue_a, chroma), (hue_b, _) = _hue(a), _hue(b)
    apart = np.abs(hue_a - hue_b)[chroma > 100]
    return np.minimum(apart, 255 - apart)


def _hue(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r, g, b = np.moveaxis(image.astype(np.float64), -1, 0)
    high, chroma = image.max(-1), (image.max(-1) - image.min(-1)).astype(np.float64)
    c = np.maximum(chroma, 1)
    sector = np.where(high == r, (g - b) / c, np.where(high == g, 2 + (b - r) / c, 4 + (r - g) / c))
    return (sector % 6) * 42.5, chroma
