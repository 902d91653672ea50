"""Colour operations on (C, 3, S, S) float32 images of whole numbers 0..255, each as Pillow does it on bytes.

Every operation ends on whole numbers again, as Pillow's does, and all but the division in `hue_shift` is exact in
float32 (whole numbers below 2^24; factors from `sample_params` are multiples of 2^-13), so the result has the same bits
in any batch, on any device, fused or not. Brightness, contrast, saturation and greyscale equal Pillow bit for bit. Hue
equals it but for 0.3 % of colours, where Pillow's own float noise puts the hue one of its 256 levels lower.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastssl.augment.params import ViewParams


def luma(x: Tensor) -> Tensor:
    """Pillow's "L", (C, 3, S, S) -> (C, 1, S, S): (19595 R + 38470 G + 7471 B + 2^15) >> 16."""
    grey = x[:, 0:1] * (19595 / 65536)
    return grey.add_(x[:, 1:2], alpha=38470 / 65536).add_(x[:, 2:3], alpha=7471 / 65536).add_(0.5).floor_()


def blend(x: Tensor, degenerate: Tensor | None, factor: Tensor) -> Tensor:
    """Pillow's Image.blend(degenerate, x, factor): rounds towards zero, clamps to 0..255. None stands for black."""
    factor = factor.view(-1, 1, 1, 1)
    if degenerate is None:
        return (x * factor).clamp_(0, 255).floor_()
    # the product and the sum are rounded apart, as in Pillow
    return (x - degenerate).mul_(factor).add_(degenerate).clamp_(0, 255).floor_()


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Towards black below 1."""
    return blend(x, None, factor)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Towards the mean grey of the image as it is now, rounded to a whole number as in Pillow."""
    pixels = x.shape[2] * x.shape[3]
    # rows sum exactly in float32 and their sums in float64, so the order of summation does not matter
    total = luma(x).sum(dim=3).sum(dim=(1, 2), dtype=torch.float64)
    mean = (total.mul_(2).add_(pixels) / total.new_full((), 2 * pixels)).floor_().float()
    return blend(x, mean.view(-1, 1, 1, 1), factor)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Towards each pixel's own grey."""
    return blend(x, luma(x), factor)


def hue_shift(x: Tensor, turns: Tensor) -> Tensor:
    """Turns the hue by `turns` (C,) of the circle, through Pillow's HSV of 256 levels each, as torchvision does."""
    hue, chroma, value = _hue_chroma_value(x)
    levels = (turns * 255).trunc_().view(-1, 1, 1)  # torchvision's int(turns * 255)
    hue = hue.add_(levels)
    hue = hue.sub_((hue * (1 / 256)).floor_(), alpha=256).mul_(6)  # bytes wrap at 256; 6 * 255 is the whole circle
    saturation_255 = _floor_quotient(chroma.mul_(255), value.clamp(min=1))
    scaled = saturation_255.mul_(value)  # value * saturation * 255
    out = torch.empty_like(x)
    # how far each channel lies below the value, as a piecewise linear function of the hue (HSV cone, 255 to a sector)
    for channel, centre, sign, start in ((0, 765, -1, 510), (1, 510, 1, -255), (2, 1020, 1, -255)):
        below = (hue - centre).abs_().mul_(sign).add_(start).clamp_(0, 255).mul_(scaled).add_(32512)
        torch.sub(value, below.div_(x.new_full((), 65025.0)).floor_(), out=out[:, channel])
    return out


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
    hue = sector.mul_(chroma).add_(second).sub_(low).abs_().mul_(255)
    return _floor_quotient(hue, chroma.clamp(min=1).mul_(6)), chroma, value


def _floor_quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """floor(numerator / denominator) of whole numbers, in place; the half keeps rounding away from whole quotients."""
    return numerator.add_(0.5).div_(denominator).floor_()


def solarise(x: Tensor) -> Tensor:
    """Inverts the values from 128 up (Pillow's ImageOps.solarize)."""
    return torch.where(x < 128, x, 255 - x)


JITTER = ((brightness, "brightness"), (contrast, "contrast"), (saturation, "saturation"), (hue_shift, "hue"))


def jitter_order(order: Tensor) -> Tensor:
    """order (C,) in [0, 24) -> (C, 4): row n is the n-th of itertools.permutations(range(4)), without a table."""
    first, rest = order // 6, order % 6
    second = rest // 2
    second = second + (second >= first)
    third = rest % 2
    third = third + (third >= torch.minimum(first, second))
    third = third + (third >= torch.maximum(first, second))
    return torch.stack([first, second, third, 6 - first - second - third], dim=1)


def apply_where(mask: Tensor, x: Tensor, operation: Callable[..., Tensor], *params: Tensor) -> Tensor:
    """`operation(x, *params)` for the images where `mask` (C,) is true; may overwrite x on the CPU.

    On the CPU only those images are computed; elsewhere all are, for to choose them the host would have to wait.
    """
    if x.device.type != "cpu":
        return torch.where(mask.view(-1, 1, 1, 1), operation(x, *params), x)
    count = int(mask.count_nonzero())
    if count in (0, x.shape[0]):
        return operation(x, *params) if count else x
    chosen = mask.nonzero()[:, 0]
    x[chosen] = operation(x[chosen], *(p[chosen] for p in params))
    return x


def apply_jitter(x: Tensor, params: ViewParams) -> Tensor:
    """Brightness, contrast, saturation and hue in each image's own order, where `params.jitter`."""
    order = jitter_order(params.order)
    for position in range(4):
        for number, (operation, name) in enumerate(JITTER):
            value = getattr(params, name)
            changes = value != (0.0 if name == "hue" else 1.0)
            x = apply_where(params.jitter & (order[:, position] == number) & changes, x, operation, value)
    return x
