"""Normalises bytes with ImageNet's mean and standard deviation.

The result depends only on byte and channel, so views can travel between ranks as bytes and be normalised on arrival.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fastssl.augment.choose import choose_augment_kernel

MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB in 0..1
STD = (0.229, 0.224, 0.225)
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # the integer dtype of a size in bytes


def update_normalise(x: Tensor) -> None:
    """x (C, 3, S, S) float32 in 0..255 -> (x / 255 - mean) / std of its channel, in place."""
    for plane, mean, std in zip(x.unbind(1), MEAN, STD):
        plane.sub_(255 * mean).mul_(1 / (255 * std))


def normalise_bytes(x: Tensor, dtype: torch.dtype, kernel: str = "auto") -> Tensor:
    """Normalises views (B, 3, S, S) uint8, contiguous or channels_last; returns the same shape and layout in `dtype`.

    The bits are those of a view made in `dtype`. kernel: auto, triton (one launch), numba or reference (both in plain
    PyTorch here), see `choose_augment_kernel`. Raises ValueError for a kernel that cannot run.
    """
    chosen, _ = choose_augment_kernel(x.device, kernel)
    if chosen == "triton":
        from fastssl.kernels.views_normalise import normalise_triton  # Triton may be missing

        return normalise_triton(x, MEAN, STD, dtype)
    x = x.to(torch.float32)
    update_normalise(x)
    return x.to(dtype)


@cache
def byte_levels(dtype: torch.dtype) -> Tensor:
    """(3, 256): normalised values of the bytes of a channel, as integers with the bits of `dtype`; uint8: itself."""
    x = torch.arange(256, dtype=torch.float32).expand(1, 3, 1, 256).clone()
    if dtype != torch.uint8:
        update_normalise(x)
    return x[0, :, 0].to(dtype).contiguous().view(BITS[dtype.itemsize])
