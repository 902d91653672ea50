"""Antialiased bilinear resizing of boxes of any size to S x S, in two passes on bytes, as in Pillow.

`resample_reference` gives the bits of Pillow's fixed-point arithmetic, on whole batches and on any device. (Pillow 13
sometimes does the vertical pass first, which changes some pixels by 1.) The views call it through resize.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.augment.params import ViewParams
from fastssl.batch import ImageBatch

PRECISION_BITS = 22  # of Pillow's fixed point: 32 less 8 for a pixel and 2 for overshoot


class Axis(NamedTuple):
    """How S outputs are computed along one axis of a box in each image; tensors are (C,)."""

    start: Tensor  # int64, the first pixel of the box in the image
    length: Tensor  # int64, the pixels in the box, beyond which the filter does not look
    scale: Tensor  # float64, pixels of the box per output
    offset: Tensor  # float64, outputs cut off before the first (for a centre crop of the resized box)

    def of(self, i: int) -> Axis:
        """The axis for image i alone."""
        return Axis(*(t[i : i + 1] for t in self))


def crop_axes(params: ViewParams, size: int) -> tuple[Axis, Axis]:
    """The two axes (vertical, horizontal) of `params`'s crop boxes resized to size x size."""
    axes = []
    for start, length in ((params.top, params.crop_height), (params.left, params.crop_width)):
        scale = length.double() / torch.full_like(length, size)
        axes.append(Axis(start.long(), length.long(), scale, torch.zeros_like(scale)))
    return axes[0], axes[1]


def eval_axes(batch: ImageBatch, size: int, resize: int) -> tuple[Axis, Axis]:
    """The two axes of torchvision's Resize(resize) and CenterCrop(size) of whole images."""
    short = torch.minimum(batch.height, batch.width).long()
    axes = []
    for length in (batch.height.long(), batch.width.long()):
        resized = length * resize // short  # torchvision's int(resize * long / short); resize itself for the short side
        offset = torch.round((resized - size).double() * 0.5)  # half to even, as Python's round
        axes.append(Axis(torch.zeros_like(length), length, length.double() / resized.double(), offset))
    return axes[0], axes[1]


def axis_taps(axis: Axis, size: int, taps: int) -> tuple[Tensor, Tensor]:
    """Pillow's bilinear filter: first pixel in the box (C, S) int64, and weights (C, S, taps) int32 in 2^-22 steps."""
    out = torch.arange(size, device=axis.start.device, dtype=torch.float64)
    centre = (out + axis.offset[:, None] + 0.5) * axis.scale[:, None]
    support = axis.scale.clamp(min=1)[:, None]
    first = (centre - support + 0.5).trunc().clamp(min=0)
    last = torch.minimum((centre + support + 0.5).trunc(), axis.length[:, None].double())
    pixel = first[..., None] + torch.arange(taps, device=first.device)
    weight = (1 - ((pixel - centre[..., None] + 0.5) / support[..., None]).abs()).clamp(min=0)
    weight = weight * (pixel < last[..., None])
    total = weight[..., 0]
    for t in range(1, taps):  # one by one, which gives the bits of Pillow's sum for any `taps`
        total = total + weight[..., t]
    return first.long(), (weight / total[..., None] * 2**PRECISION_BITS + 0.5).floor().int()


def resample_reference(batch: ImageBatch, vertical: Axis, horizontal: Axis, size: int) -> Tensor:
    """Resizes boxes to (C, 3, S, S) uint8 with Pillow's bits, for the C images of `batch`."""
    device, max_side = batch.pixels.device, batch.max_side  # no box has more pixels along an axis
    max_scale = max_side / size
    if device.type == "cpu":  # without a sync: one large image in the data set costs the others no rows and no taps
        max_scale, max_side = float(torch.maximum(vertical.scale, horizontal.scale).max()), int(vertical.length.max())
    taps = 2 * math.ceil(max(1.0, max_scale)) + 1
    first, weight = axis_taps(horizontal, size, taps)
    last = (horizontal.length - 1)[:, None]
    row = torch.minimum(torch.arange(max_side, device=device), (vertical.length - 1)[:, None])
    line = (
        batch.offset[:, None] + ((vertical.start[:, None] + row) * batch.width[:, None] + horizontal.start[:, None]) * 3
    )
    channel = torch.arange(3, device=device)
    rows = torch.full((batch.size, max_side, size, 3), 1 << (PRECISION_BITS - 1), dtype=torch.int32, device=device)
    for t in range(taps):
        column = torch.minimum(first + t, last) * 3
        at = line[:, :, None, None] + column[:, None, :, None] + channel
        rows += batch.pixels[at] * weight[:, None, :, t, None]
    rows = (rows >> PRECISION_BITS).clamp_(0, 255)
    first, weight = axis_taps(vertical, size, taps)
    out = torch.full((batch.size, size, size, 3), 1 << (PRECISION_BITS - 1), dtype=torch.int32, device=device)
    for t in range(taps):
        at = torch.minimum(first + t, (vertical.length - 1)[:, None])[:, :, None, None].expand_as(out)
        out += rows.gather(1, at) * weight[:, :, t, None, None]
    return (out >> PRECISION_BITS).clamp_(0, 255).to(torch.uint8).permute(0, 3, 1, 2)
