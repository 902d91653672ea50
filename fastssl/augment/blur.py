"""Gaussian blur with each image's own sigma, separable, in arithmetic that is exact in float32.

The taps extend to 4 sigma (at most 8 pixels) and are multiples of 2^-14; the result of the first pass is rounded to
quarters. So every sum fits into 24 bits, and does not depend on the order of summation, on fused multiply-adds or on
the batch. Beyond the border the edge pixel is repeated, as in Pillow.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastssl.augment.crops import exact_exp
from fastssl.augment.params import MAX_BLUR_SIGMA

BLUR_RADIUS = int(4 * MAX_BLUR_SIGMA)


def gaussian_taps(sigma: Tensor) -> Tensor:
    """sigma (C,) float32 in pixels -> (C, BLUR_RADIUS + 1) float32: weights at distance 0, 1, ... of a sum of 1."""
    sigma = sigma.double()[:, None]
    distance = torch.arange(BLUR_RADIUS + 1, device=sigma.device, dtype=torch.float64)
    exponent = (distance * distance) / (sigma * sigma * -2)
    weight = exact_exp(exponent.clamp(min=-8)) * (distance <= sigma * 4)  # 4 sigma: exponent -8
    total = weight[:, 0]
    for k in range(1, BLUR_RADIUS + 1):
        total = total + weight[:, k] * 2
    steps = torch.round(weight[:, 1:] * 2**14 / total[:, None])
    return (torch.cat([2**14 - 2 * steps.sum(dim=1, keepdim=True), steps], dim=1) * 2.0**-14).float()


def update_blur(x: Tensor, taps: Tensor) -> None:
    """Blurs x (C, 3, S, S), whole numbers in float32, with `gaussian_taps` (C, BLUR_RADIUS + 1), in place; rounds."""
    size = x.shape[-1]
    # the radius in use can be read from the taps on a CPU; on a GPU that would be a sync
    radius = BLUR_RADIUS if x.device.type != "cpu" else int((taps != 0).any(dim=0).sum()) - 1
    stride = size + 2 * radius
    columns = taps[:, : radius + 1].split(1, dim=1)
    for plane in x.unbind(1):
        # flat, so that a shift by a column or a row is an offset; what wraps around ends up in the margins
        flat = pad(plane, (radius, radius, radius, radius), mode="replicate").flatten(1)
        flat = _blur_flat(flat, columns, 1).mul_(4).round_()
        flat = _blur_flat(flat, columns, stride).mul_(0.25).round_()
        plane.copy_(flat.view(-1, stride, stride)[:, :size, :size])


def _blur_flat(flat: Tensor, columns: Sequence[Tensor], step: int) -> Tensor:
    """out[i] = sum over k of columns[|k|] * flat[i + (radius + k) * step]; the last 2 * radius * step are undefined."""
    radius = len(columns) - 1
    length = flat.shape[1] - 2 * radius * step
    whole = torch.empty_like(flat)
    out = torch.mul(flat.narrow(1, radius * step, length), columns[0], out=whole.narrow(1, 0, length))
    for k in range(1, radius + 1):
        out.addcmul_(flat.narrow(1, (radius - k) * step, length), columns[k])
        out.addcmul_(flat.narrow(1, (radius + k) * step, length), columns[k])
    return whole
