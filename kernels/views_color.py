"""Colour operations of the views in Triton, from three planes of whole numbers 0..255 (float32) to the same.

Factors are multiples of 2^-13, so every step is exact and the results have the same bits as the PyTorch reference
(`fastssl/augment/color.py`, which explains the formulas), whether or not the compiler fuses multiply-adds.
"""

from __future__ import annotations

import triton
import triton.language as tl

_SECTOR_UNIT = tl.constexpr(255 * 42.5)
_ROUND = tl.constexpr(1.5 * 2**23)  # x + this - this rounds |x| < 2^22 to the nearest whole number, half to even


@triton.jit
def round_even(x):
    """The nearest whole number, half to even, of |x| < 2^22."""
    return (x + _ROUND) - _ROUND


@triton.jit
def luma(red, green, blue):
    """The luma of Pillow's mode "L"."""
    weighted = red * (19595 / 65536) + green * (38470 / 65536) + blue * (7471 / 65536)
    return tl.floor(weighted + 0.5)


@triton.jit
def _to_byte(x):
    return tl.floor(tl.minimum(tl.maximum(x, 0.0), 255.0))


@triton.jit
def _blend(red, green, blue, anchor, factor):
    """Pillow's blend: anchor + factor * (channel - anchor), as bytes."""
    rest = anchor * (1.0 - factor)
    return _to_byte(red * factor + rest), _to_byte(green * factor + rest), _to_byte(blue * factor + rest)


@triton.jit
def _hue_channel(distance, base, scaled):
    below = tl.minimum(tl.maximum(distance, 42.5), 85.0)
    return round_even(tl.div_rn(base - below * scaled, tl.full(base.shape, _SECTOR_UNIT, tl.float32)))


@triton.jit
def turn_hue(red, green, blue, levels):
    """Turns the hue by `levels` of 256, through Pillow's HSV."""
    high, low = tl.maximum(green, blue), tl.minimum(green, blue)
    value = tl.maximum(red, high)
    chroma = value - tl.minimum(red, low)
    sector = tl.minimum(tl.maximum(blue - green, 0.0), 1.0) * -6.0
    red_not_highest = tl.minimum(tl.maximum(value - red, 0.0), 1.0)
    sector += red_not_highest * (-2.0 - 2.0 * sector)
    hue = tl.abs(tl.minimum(red, high) - low + sector * chroma) * 42.5
    hue = tl.floor(tl.div_rn(hue, tl.maximum(chroma, 1.0))) + levels
    hue -= 256.0 * tl.floor(hue * (1 / 256))
    scaled = tl.floor(tl.div_rn(chroma * 255.0, tl.maximum(value, 1.0))) * value
    base = value * _SECTOR_UNIT + 42.5 * scaled
    red = _hue_channel(127.5 - tl.abs(hue - 127.5), base, scaled)
    green = _hue_channel(tl.abs(hue - 85.0), base, scaled)
    blue = _hue_channel(tl.abs(hue - 170.0), base, scaled)
    return red, green, blue


@triton.jit
def jitter(red, green, blue, plan, first, stop, brightness, contrast, saturation, hue_levels, mean):
    """Applies operations first <= p < stop of the plan, which holds three bits for each: 0 brightness, 1 contrast
    (around `mean`), 2 saturation, 3 hue, else nothing.
    """
    for p in range(first, stop):
        operation = (plan >> (3 * p)) & 7
        if operation == 0:
            red, green, blue = _blend(red, green, blue, 0.0, brightness)
        elif operation == 1:
            red, green, blue = _blend(red, green, blue, mean, contrast)
        elif operation == 2:
            red, green, blue = _blend(red, green, blue, luma(red, green, blue), saturation)
        elif operation == 3:
            red, green, blue = turn_hue(red, green, blue, hue_levels)
    return red, green, blue
