"""Photograph-like images rendered for the tests: smooth light, hard edges, saturated colours, noise."""

from __future__ import annotations

import numpy as np
import torch

from fastssl.batch import ImageBatch, pack_images

SIZES = ((120, 160), (160, 107), (32, 32), (1, 1), (1, 500), (500, 1), (5, 7), (300, 420), (224, 224))


def render_photo(height: int, width: int, seed: int, grey: bool = False) -> np.ndarray:
    """(height, width, 3) uint8."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    phase, pace = random.uniform(0, 6, (2, 3)), random.uniform(1, 9, (2, 3))
    image = 128 + 90 * np.sin(pace[0] * y[..., None] + phase[0]) * np.cos(pace[1] * x[..., None] + phase[1])
    for _ in range(12):
        centre, radius = random.uniform(0, 1, 2), random.uniform(0.02, 0.2)
        inside = np.hypot(y - centre[0], x - centre[1]) < radius
        image[inside] = random.integers(0, 256, 3)
    image += random.normal(0, 8, image.shape)
    pixels = np.clip(np.round(image), 0, 255).astype(np.uint8)
    return np.repeat(pixels[..., :1], 3, axis=2) if grey else pixels


def photo_batch(sizes: tuple[tuple[int, int], ...] = SIZES, first_index: int = 0) -> ImageBatch:
    """One photo of each size; every fifth is grey."""
    images = [render_photo(*size, seed=first_index + i, grey=i % 5 == 4) for i, size in enumerate(sizes)]
    indices = range(first_index, first_index + len(images))
    return pack_images(images, indices, [0] * len(images))


def planes(image: np.ndarray) -> torch.Tensor:
    """(H, W, 3) uint8 -> (1, 3, H, W) float32."""
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float().contiguous()


def pixels(x: torch.Tensor) -> np.ndarray:
    """(1, 3, H, W) of whole numbers -> (H, W, 3) int64."""
    rounded = x[0].permute(1, 2, 0).numpy()
    assert np.array_equal(rounded, np.round(rounded)) and rounded.min() >= 0 and rounded.max() <= 255
    return rounded.astype(np.int64)
