"""Colour operations on (C, 3, S, S) float32 images of whole numbers 0..255, in place, each as Pillow does it on bytes.

Every operation ends on whole numbers again, as Pillow's does, and all sums and products on the way are exact in float32
(whole numbers below 2^24; factors from `sample_params` are multiples of 2^-13), so the result has the same bits in any
batch, on any device, fused or not. Brightness, contrast, saturation and greyscale equal Pillow bit for bit. Hue equals
it but for 0.3 % of colours, where Pillow's own float noise puts the hue one of its 256 levels lower.

They work channel by channel: on a CPU a plane of a 224-pixel view stays in the L2 cache where three do not.
"""

from __future__ import annotations

import torch
from torch import Tensor


def luma(x: Tensor) -> Tensor:
    """Pillow's "L", (C, 3, S, S) -> (C, S, S): (19595 R + 38470 G + 7471 B + 2^15) >> 16."""
    grey = x[:, 0] * (19595 / 65536)
    return grey.add_(x[:, 1], alpha=38470 / 65536).add_(x[:, 2], alpha=7471 / 65536).add_(0.5).floor_()


def update_greyscale(x: Tensor) -> None:
    """All channels become the luma."""
    x.copy_(luma(x)[:, None])


def update_brightness(x: Tensor, factor: Tensor) -> None:
    """Towards black below 1; factor (C,)."""
    factor = factor.view(-1, 1, 1)
    for plane in x.unbind(1):
        plane.mul_(factor).clamp_(0, 255).floor_()


def update_contrast(x: Tensor, factor: Tensor) -> None:
    """Towards the mean luma of the image as it is now, rounded to a whole number as in Pillow; factor (C,)."""
    pixels = x.shape[2] * x.shape[3]
    # rows sum exactly in float32 and their sums in float64, so the order of summation does not matter
    total = luma(x).sum(dim=2).sum(dim=1, dtype=torch.float64)
    mean = (total.mul_(2).add_(pixels) / total.new_full((), 2 * pixels)).floor_().float()
    _update_blend(x, mean.view(-1, 1, 1), factor)


def update_saturation(x: Tensor, factor: Tensor) -> None:
    """Towards each pixel's own luma; factor (C,)."""
    _update_blend(x, luma(x), factor)


def _update_blend(x: Tensor, anchor: Tensor, factor: Tensor) -> None:
    """Pillow's Image.blend(anchor, x, factor): rounds towards zero, clamps to 0..255."""
    factor = factor.view(-1, 1, 1)
    for plane in x.unbind(1):
        plane.sub_(anchor).mul_(factor).add_(anchor).clamp_(0, 255).floor_()


def update_hue(x: Tensor, turns: Tensor) -> None:
    """Turns the hue by `turns` (C,) of the circle, through Pillow's HSV of 256 levels each, as torchvision does."""
    levels = (turns * 255).trunc_().view(-1, 1, 1)  # torchvision's int(turns * 255)
    hue, chroma, value = _hue_chroma_value(x)
    hue.add_(levels)
    hue.sub_((hue * (1 / 256)).floor_(), alpha=256).mul_(6)  # bytes wrap at 256; 6 * 255 is the whole circle
    scaled = _floor_quotient(chroma.mul_(255), value.clamp(min=1)).mul_(value)  # 255 * saturation * value
    unit = x.new_full((), 65025.0)  # as a tensor: a GPU multiplies by the reciprocal of a number instead
    # how far each channel lies below the value: a trapezoid over the hue, 255 to each of the six sectors
    for plane, centre in zip(x.unbind(1), (765, 510, 1020)):
        distance = (hue - centre).abs_()
        below = distance.sub_(255) if centre != 765 else distance.neg_().add_(510)
        torch.sub(value, below.clamp_(0, 255).mul_(scaled).div_(unit).round_(), out=plane)


def _hue_chroma_value(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(C, 3, S, S) -> hue in whole levels of 1/255 turn, max - min, and max; each (C, S, S)."""
    red, green, blue = x.unbind(1)
    high, low = torch.maximum(green, blue), torch.minimum(green, blue)
    value, second = torch.maximum(red, high), torch.minimum(red, high)
    chroma = value - torch.minimum(red, low)
    # 1 where the comparison holds and else 0; arithmetic on these is far quicker than torch.where
    blue_above_green, red_not_highest = (blue - green).clamp_(0, 1), (value - red).clamp_(0, 1)
    # 6 chroma * hue = |second - low + chroma * sector|, sector = 0, -6 (red highest), -2 (green), 4 (blue)
    sector = (blue_above_green * 12).sub_(2).mul_(red_not_highest).sub_(blue_above_green, alpha=6)
    hue = second.sub_(low).addcmul_(sector, chroma).abs_().mul_(42.5)
    return _floor_quotient(hue, chroma.clamp(min=1)), chroma, value


def _floor_quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """floor(numerator / denominator) of multiples of 1/2, in place; the eighth keeps rounding off whole quotients."""
    return numerator.add_(0.125).div_(denominator).floor_()


def update_solarise(x: Tensor) -> None:
    """Inverts the values from 128 up (Pillow's ImageOps.solarize)."""
    x.copy_(torch.where(x < 128, x, 255 - x))
