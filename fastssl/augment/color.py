"""Colour operations on (C, 3, S, S) images of whole numbers 0..255 in float32, in place, as Pillow does them on bytes.

Every operation ends with whole numbers, as in Pillow, and with the factors of `sample_params` (multiples of 2^-13) all
sums and products on the way are exact in float32. So the result has the same bits in any batch, on any device, fused or
not, and brightness, contrast, saturation and greyscale equal Pillow's bit for bit. Hue differs for 0.3 % of the
colours, where rounding inside Pillow puts the hue one of its 256 levels lower.

They work channel by channel, because a single channel of a 224-pixel view fits into a CPU's L2 cache and three do not.
"""

from __future__ import annotations

import torch
from torch import Tensor

SECTOR_UNIT = 255 * 42.5  # 255 levels of saturation times a sixth of the 255 levels of hue


def luma(x: Tensor) -> Tensor:
    """Pillow's "L", (C, 3, S, S) -> (C, S, S): (19595 R + 38470 G + 7471 B + 2^15) >> 16."""
    grey = torch.add(x.new_full((), 0.5), x[:, 0], alpha=19595 / 65536)
    return grey.add_(x[:, 1], alpha=38470 / 65536).add_(x[:, 2], alpha=7471 / 65536).floor_()


def update_greyscale(x: Tensor) -> None:
    """Sets all channels to the luma."""
    x.copy_(luma(x)[:, None])


def update_brightness(x: Tensor, factor: Tensor) -> None:
    """Multiplies by factor (C,): below 1 the image gets darker."""
    factor = factor.view(-1, 1, 1)
    for plane in x.unbind(1):
        plane.mul_(factor).clamp_(0, 255).floor_()


def update_contrast(x: Tensor, factor: Tensor) -> None:
    """Blends with the current mean luma of the image, rounded as in Pillow; factor (C,), below 1 reduces contrast."""
    pixels = x.shape[2] * x.shape[3]
    # Sums of rows are exact in float32, and sums of those in float64, so their order does not matter.
    total = luma(x).sum(dim=2).sum(dim=1, dtype=torch.float64)
    mean = (total.mul_(2).add_(pixels) / total.new_full((), 2 * pixels)).floor_().float()
    factor = factor.view(-1, 1, 1)
    anchor = mean.view(-1, 1, 1) * (1 - factor)
    for plane in x.unbind(1):
        plane.mul_(factor).add_(anchor).clamp_(0, 255).floor_()


def update_saturation(x: Tensor, factor: Tensor) -> None:
    """Blends each pixel with its luma; factor (C,), below 1 reduces saturation."""
    factor = factor.view(-1, 1, 1)
    anchor = luma(x).mul_(1 - factor)
    for plane in x.unbind(1):
        torch.addcmul(anchor, plane, factor, out=plane).clamp_(0, 255).floor_()


def hue_levels(turns: Tensor) -> Tensor:
    """turns (C,) of the colour circle -> whole levels of 1/255, as torchvision's int(turns * 255)."""
    return (turns * 255).trunc()


def update_hue(x: Tensor, turns: Tensor) -> None:
    """Turns the hue by `turns` (C,) of the colour circle, through Pillow's 8-bit HSV, as torchvision does."""
    hue, chroma, value, spare = _hue_chroma_value(x)
    hue.add_(hue_levels(turns).view(-1, 1, 1))
    hue.sub_(torch.mul(hue, 1 / 256, out=spare).floor_(), alpha=256)  # bytes wrap at 256, though 255 is the circle
    saturation = chroma.mul_(255).div_(torch.clamp(value, min=1, out=spare)).floor_()
    # channel = round(value - value * saturation * below), where `below` in 0..1 is how far the hue is from the sectors
    # in which this channel is highest. With value * saturation in units of 1/255 and `below` in units of 1/42.5, that
    # is a numerator exact in float32, divided by SECTOR_UNIT.
    scaled = saturation.mul_(value)
    base = value.mul_(SECTOR_UNIT).add_(scaled, alpha=42.5)
    unit = x.new_full((), SECTOR_UNIT)  # a tensor, because a GPU divides by a number through its rounded reciprocal
    for plane, centre in zip(x.unbind(1), (127.5, 85.0, 170.0)):
        distance = torch.sub(hue, centre, out=spare).abs_()  # levels from the hue where this channel is highest
        if centre == 127.5:
            distance.neg_().add_(127.5)  # red is lowest at 127.5 and highest at 0 = 255, where the circle closes
        torch.addcmul(base, distance.clamp_(42.5, 85), scaled, value=-1, out=plane).div_(unit).round_()


def _hue_chroma_value(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(C, 3, S, S) -> hue in whole levels of 1/255 turn, max - min, max, and a scratch tensor; each (C, S, S).

    Tensors that are no longer needed are reused, while they are still in the cache.
    """
    red, green, blue = x.unbind(1)
    high, low = torch.maximum(green, blue), torch.minimum(green, blue)
    value = torch.maximum(red, high)
    # sector = 0 or -6 (red is highest; -6 if blue is above green), -2 (green) or 4 (blue), by arithmetic on comparisons
    # that give 1 or 0, which is far faster than torch.where.
    sector = (blue - green).clamp_(0, 1).mul_(-6)
    red_not_highest = (value - red).clamp_(0, 1)
    spare = torch.add(x.new_full((), -2.0), sector, alpha=-2)
    sector.addcmul_(red_not_highest, spare)
    # 6 chroma * hue = |second - low + chroma * sector|
    hue = torch.minimum(red, high, out=high).sub_(low)
    chroma = torch.sub(value, torch.minimum(red, low, out=low), out=low)
    hue.addcmul_(sector, chroma).abs_().mul_(42.5)
    return hue.div_(torch.clamp(chroma, min=1, out=spare)).floor_(), chroma, value, spare


def update_solarise(x: Tensor) -> None:
    """Inverts the values from 128 up (Pillow's ImageOps.solarize)."""
    x.copy_(torch.where(x < 128, x, 255 - x))
