"""Gaussian blur with each image's own sigma: separable taps in arithmetic that is exact in float32.

Taps reach to 4 sigma (at most 8 pixels) and are multiples of 2^-14; the first pass is rounded to quarters. So every sum
has at most 24 bits, and its bits do not depend on the order of summation, on fused multiply-adds or on the batch.
The edge pixel is repeated beyond the border, as in Pillow.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastssl.augment.params import MAX_BLUR_SIGMA, exact_exp

BLUR_RADIUS = int(4 * MAX_BLUR_SIGMA)


def gaussian_taps(sigma: Tensor) -> Tensor:
    """sigma (C,) float32 in pixels -> (C, BLUR_RADIUS + 1) float32: the weights at distance 0, 1, ..., summing to 1."""
    sigma = sigma.double()[:, None]
    distance = torch.arange(BLUR_RADIUS + 1, device=sigma.device, dtype=torch.float64)
    exponent = (distance * distance) / (sigma * sigma * -2)
    weight = exact_exp(exponent.clamp(min=-8)) * (distance <= sigma * 4)  # 4 sigma: exponent -8
    total = weight[:, 0]
    for k in range(1, BLUR_RADIUS + 1):
        total = total + weight[:, k] * 2
    steps = torch.round(weight[:, 1:] * 2**14 / total[:, None])
    return (torch.cat([2**14 - 2 * steps.sum(dim=1, keepdim=True), steps], dim=1) * 2.0**-14).float()


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """x (C, 3, S, S) float32 whole numbers, sigma (C,) float32 in (0, MAX_BLUR_SIGMA] -> the same, blurred, rounded."""
    taps = gaussian_taps(sigma)
    # on the CPU the reach is read from the taps; elsewhere that would make the host wait
    radius = BLUR_RADIUS if x.device.type != "cpu" else int((taps > 0).any(dim=0).sum()) - 1
    taps = taps.view(-1, BLUR_RADIUS + 1, 1, 1, 1)
    x = _blur_axis(x, taps, radius, dim=3).mul_(4).round_()
    return _blur_axis(x, taps, radius, dim=2).mul_(0.25).round_()


def _blur_axis(x: Tensor, taps: Tensor, radius: int, dim: int) -> Tensor:
    size = x.shape[dim]
    margin = (radius, radius, 0, 0) if dim == 3 else (0, 0, radius, radius)
    padded = pad(x, margin, mode="replicate")
    out = x * taps[:, 0]
    for k in range(1, radius + 1):
        out.addcmul_(padded.narrow(dim, radius - k, size), taps[:, k])
        out.addcmul_(padded.narrow(dim, radius + k, size), taps[:, k])
    return out
