"""Launch one of the views: crop, antialiased resize and flip, then the colour operations that stand before contrast.

A program makes one tile of one view and leaves, beside its bytes, the sum of its luma: contrast turns on the mean of
the whole image as it is when contrast's turn comes, which no program knows before all have finished. Sums are of whole
numbers and one per tile, so the mean has the same bits every time.

The resize is Pillow's: along rows, rounded to bytes, then along columns, weights in steps of 2^-22. With L pixels of
the box per S outputs, the triangle's weight of pixel p in output o is a whole number over 2 max(L, S),

    max(0, 2 max(L, S) - |(2 p + 1) S - (2 o + 1) L|)

so that weights need no coordinate in floating point, whatever the size of the image.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .views_color import jitter, luma
from .views_table import (
    BLUR_RADIUS,
    BRIGHTNESS,
    CONTRAST_AT,
    CROP_HEIGHT,
    CROP_WIDTH,
    FLIP,
    FLOATS,
    GREY_BEFORE,
    HUE_LEVELS,
    INTS,
    LEFT,
    NUM_TAPS,
    PLAN,
    SATURATION,
    SIGMA,
    TOP,
)

_RADIUS = tl.constexpr(BLUR_RADIUS)
_NUM_TAPS = tl.constexpr(NUM_TAPS)
_ROUND64 = tl.constexpr(1.5 * 2**52)
_HALF = tl.constexpr(1 << 21)


@triton.jit
def weight_of(pixel, output, length, size):
    """The whole-number weight of a pixel of the box in an output."""
    distance = tl.abs((2 * pixel + 1) * size - (2 * output + 1) * length)
    return tl.where(pixel < length, tl.maximum(2 * tl.maximum(length, size) - distance, 0), 0)


@triton.jit
def _axis(output, length, size):
    """First pixel of each output, 2^22 over the sum of its weights (float64), and how many pixels to look at."""
    widest = tl.maximum(length, size)
    first = tl.maximum((2 * output + 1) * length - 2 * widest + size, 0) // (2 * size)
    count = 2 * tl.cdiv(widest, size) + 1
    total = tl.zeros_like(output).to(tl.int64)
    for t in range(0, count):
        total += weight_of(first + t, output, length, size).to(tl.int64)
    return first, 4194304.0 / total.to(tl.float64), count


@triton.jit
def _blur_taps(sigma):
    """`gaussian_taps` of one sigma: TAPS float32, multiples of 2^-14 that sum to 1 over both sides."""
    k = tl.arange(0, _NUM_TAPS)
    d = k.to(tl.float64)
    wide = sigma.to(tl.float64)
    weight = tl.exp(tl.maximum(d * d / (wide * wide * -2.0), -8.0))
    weight = tl.where((d <= wide * 4.0) & (k <= _RADIUS), weight, 0.0)
    total = tl.sum(tl.where(k == 0, weight, 2.0 * weight), 0)
    steps = ((weight * 16384.0 / total) + _ROUND64) - _ROUND64
    centre = 16384.0 - 2.0 * tl.sum(tl.where(k == 0, 0.0, steps), 0)
    return (tl.where(k == 0, centre, steps) * (1 / 16384)).to(tl.float32)


@triton.jit
def crop_tiles(
    pixels_ptr,  # (P,) uint8
    offset_ptr,  # (B,) int64
    width_ptr,  # (B,) int32
    ints_ptr,  # (N, INTS) int32
    floats_ptr,  # (N, FLOATS) float32
    planes_ptr,  # (N, 3, S, S) uint8, result
    luma_ptr,  # (N, tiles) int32, result: the sum of the luma of each tile
    taps_ptr,  # (N, TAPS) float32, result: the taps of each view's blur
    B,
    S,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK x BLOCK pixels of one view."""
    n = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(S, BLOCK)
    ints_ptr += n * INTS
    floats_ptr += n * FLOATS
    y = (tl.program_id(0) // across) * BLOCK + tl.arange(0, BLOCK)
    x = (tl.program_id(0) % across) * BLOCK + tl.arange(0, BLOCK)
    top, left = tl.load(ints_ptr + TOP), tl.load(ints_ptr + LEFT)
    height, width = tl.load(ints_ptr + CROP_HEIGHT), tl.load(ints_ptr + CROP_WIDTH)
    image_width = tl.load(width_ptr + n % B).to(tl.int64)
    source_y = tl.minimum(y, S - 1)[:, None]
    source_x = tl.minimum(x, S - 1)[None, :]
    source_x = tl.where(tl.load(ints_ptr + FLIP) != 0, S - 1 - source_x, source_x)
    first_x, unit_x, count_x = _axis(source_x, width, S)
    first_y, unit_y, count_y = _axis(source_y, height, S)

    base_ptr = pixels_ptr + tl.load(offset_ptr + n % B) + left.to(tl.int64) * 3
    red = tl.full([BLOCK, BLOCK], _HALF, tl.int32)
    green = tl.full([BLOCK, BLOCK], _HALF, tl.int32)
    blue = tl.full([BLOCK, BLOCK], _HALF, tl.int32)
    for i in range(0, count_y):
        row = first_y + i
        weight_y = (weight_of(row, source_y, height, S).to(tl.float64) * unit_y + 0.5).to(tl.int32)
        row_ptr = base_ptr + (top + tl.minimum(row, height - 1)).to(tl.int64) * (image_width * 3)
        row_red = tl.full([BLOCK, BLOCK], _HALF, tl.int32)
        row_green = tl.full([BLOCK, BLOCK], _HALF, tl.int32)
        row_blue = tl.full([BLOCK, BLOCK], _HALF, tl.int32)
        for j in range(0, count_x):
            column = first_x + j
            weight_x = (weight_of(column, source_x, width, S).to(tl.float64) * unit_x + 0.5).to(tl.int32)
            pixel_ptr = row_ptr + tl.minimum(column, width - 1) * 3
            row_red += tl.load(pixel_ptr).to(tl.int32) * weight_x
            row_green += tl.load(pixel_ptr + 1).to(tl.int32) * weight_x
            row_blue += tl.load(pixel_ptr + 2).to(tl.int32) * weight_x
        red += tl.minimum(row_red >> 22, 255) * weight_y
        green += tl.minimum(row_green >> 22, 255) * weight_y
        blue += tl.minimum(row_blue >> 22, 255) * weight_y
    red = tl.minimum(red >> 22, 255).to(tl.float32)
    green = tl.minimum(green >> 22, 255).to(tl.float32)
    blue = tl.minimum(blue >> 22, 255).to(tl.float32)

    if tl.load(ints_ptr + GREY_BEFORE) != 0:
        grey = luma(red, green, blue)
        red, green, blue = grey, grey, grey
    red, green, blue = jitter(
        red,
        green,
        blue,
        tl.load(ints_ptr + PLAN),
        0,
        tl.load(ints_ptr + CONTRAST_AT),
        tl.load(floats_ptr + BRIGHTNESS),
        1.0,
        tl.load(floats_ptr + SATURATION),
        tl.load(ints_ptr + HUE_LEVELS).to(tl.float32),
        0.0,
    )
    valid = (y[:, None] < S) & (x[None, :] < S)
    total = tl.sum(tl.where(valid, luma(red, green, blue), 0.0).to(tl.int32))
    tl.store(luma_ptr + n * tl.num_programs(0) + tl.program_id(0), total)
    at_ptr = planes_ptr + n * (3 * S * S) + y[:, None] * S + x[None, :]
    tl.store(at_ptr, red.to(tl.int32).to(tl.uint8), mask=valid)
    tl.store(at_ptr + S * S, green.to(tl.int32).to(tl.uint8), mask=valid)
    tl.store(at_ptr + 2 * S * S, blue.to(tl.int32).to(tl.uint8), mask=valid)
    if tl.program_id(0) == 0:
        tl.store(taps_ptr + n * _NUM_TAPS + tl.arange(0, _NUM_TAPS), _blur_taps(tl.load(floats_ptr + SIGMA)))
