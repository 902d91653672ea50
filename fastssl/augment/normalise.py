"""Bytes to numbers around 0: ImageNet's mean and deviation."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB in 0..1
STD = (0.229, 0.224, 0.225)
BITS = {2: torch.int16, 4: torch.int32}  # integers by the size of a dtype in bytes


def update_normalise(x: Tensor) -> None:
    """x (C, 3, S, S) float32, 0..255 -> (x / 255 - mean) / deviation of its channel."""
    for plane, mean, std in zip(x.unbind(1), MEAN, STD):
        plane.sub_(255 * mean).mul_(1 / (255 * std))


@cache
def byte_levels(dtype: torch.dtype) -> Tensor:
    """(3, 256): each byte of a channel normalised, as integers that have the bits of `dtype`."""
    x = torch.arange(256, dtype=torch.float32).expand(1, 3, 1, 256).clone()
    update_normalise(x)
    return x[0, :, 0].to(dtype).contiguous().view(BITS[dtype.itemsize])
