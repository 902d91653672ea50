"""Launch one of the views: crop, antialiased resize and flip, then the colour operations that come before contrast.

A program makes some tiles of one view and also stores the sum of each tile's luma. Contrast needs the mean luma of the
whole image at that point, which is known only when all programs have finished. The sums are of whole numbers, one per
tile, so the mean has the same bits every time.

The resize is Pillow's: along rows, rounded to bytes, then along columns, with weights in steps of 2^-22. If L pixels
are resized to S, the triangle filter's weight of pixel p in output o is a whole number over 2 max(L, S),

    max(0, 2 max(L, S) - |(2 p + 1) S - (2 o + 1) L|)

so the weights need no floating-point coordinates, whatever the size of the image.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .views_color import jitter, luma
from .views_draw import draw_view, load_view, round_even64
from .views_table import BLUR_RADIUS, FLOATS, INTS, NUM_TAPS

_RADIUS = tl.constexpr(BLUR_RADIUS)
_NUM_TAPS = tl.constexpr(NUM_TAPS)
_HALF = tl.constexpr(1 << 21)


@triton.jit
def weight_of(pixel, output, length, size):
    """The weight, a whole number, of a pixel of the crop in an output pixel."""
    distance = tl.abs((2 * pixel + 1) * size - (2 * output + 1) * length)
    return tl.where(pixel < length, tl.maximum(2 * tl.maximum(length, size) - distance, 0), 0)


@triton.jit
def _axis(output, length, size):
    """For each output: its first pixel, 2^22 over the sum of its weights (float64); and how many pixels to look at."""
    widest = tl.maximum(length, size)
    first = tl.maximum((2 * output + 1) * length - 2 * widest + size, 0) // (2 * size)
    count = tl.cdiv(2 * widest, size)  # the width of the triangle, at whose ends the weights are 0
    total = tl.zeros_like(output).to(tl.int64)
    for t in range(0, count):
        total += weight_of(first + t, output, length, size).to(tl.int64)
    return first, 4194304.0 / total.to(tl.float64), count


@triton.jit
def _blur_taps(sigma):
    """`gaussian_taps` of one sigma: NUM_TAPS float32 multiples of 2^-14 that, over both sides, sum to 1."""
    k = tl.arange(0, _NUM_TAPS)
    d = k.to(tl.float64)
    wide = sigma.to(tl.float64)
    weight = tl.exp(tl.maximum(d * d / (wide * wide * -2.0), -8.0))
    weight = tl.where((d <= wide * 4.0) & (k <= _RADIUS), weight, 0.0)
    total = tl.sum(tl.where(k == 0, weight, 2.0 * weight), 0)
    steps = round_even64(weight * 16384.0 / total)
    centre = 16384.0 - 2.0 * tl.sum(tl.where(k == 0, 0.0, steps), 0)
    return (tl.where(k == 0, centre, steps) * (1 / 16384)).to(tl.float32)


@triton.jit
def _resized(base_ptr, row_bytes, height, width, source_y, source_x, S, BLOCK: tl.constexpr):
    """Pixels (source_y, source_x) of the crop at `base_ptr` resized to S x S: whole numbers in float32, by channel."""
    first_x, unit_x, count_x = _axis(source_x, width, S)
    first_y, unit_y, count_y = _axis(source_y, height, S)
    red = tl.full([BLOCK, BLOCK], _HALF, tl.int32)
    green = tl.full([BLOCK, BLOCK], _HALF, tl.int32)
    blue = tl.full([BLOCK, BLOCK], _HALF, tl.int32)
    for i in range(0, count_y):
        row = first_y + i
        weight_y = (weight_of(row, source_y, height, S).to(tl.float64) * unit_y + 0.5).to(tl.int32)
        row_ptr = base_ptr + tl.minimum(row, height - 1).to(tl.int64) * row_bytes
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
    red, green, blue = tl.minimum(red >> 22, 255), tl.minimum(green >> 22, 255), tl.minimum(blue >> 22, 255)
    return red.to(tl.float32), green.to(tl.float32), blue.to(tl.float32)


@triton.jit(do_not_specialize=["seed", "epoch"])
def crop_tiles(
    pixels_ptr,  # (P,) uint8
    offset_ptr,  # (B,) int64
    height_ptr,  # (B,) int32
    width_ptr,  # (B,) int32
    index_ptr,  # (B,) int64
    policy_ptr,  # (POLICY_FIELDS,) float64
    ints_ptr,  # (N, INTS) int32; written if DRAW, else read
    floats_ptr,  # (N, FLOATS) float32; written if DRAW, else read
    planes_ptr,  # (N, 3, S, S) uint8, result
    luma_ptr,  # (N, tiles) int32, result: the sum of the luma of each tile
    taps_ptr,  # (N, TAPS) float32, result: the taps of each view's blur
    seed,
    epoch,
    B,
    S,
    tiles,
    tiles_per_program,
    DRAW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: some tiles, each BLOCK x BLOCK pixels, of one view. DRAW: it draws the view's parameters itself."""
    n = tl.program_id(1).to(tl.int64)
    ints_ptr += n * INTS
    floats_ptr += n * FLOATS
    image_width = tl.load(width_ptr + n % B)
    if DRAW:
        image_height, index, view = tl.load(height_ptr + n % B), tl.load(index_ptr + n % B), n // B
        write = tl.program_id(0) == 0
        top, left, height, width, plan, contrast_at, hue_levels, brightness, saturation, flip, grey_before, sigma = (
            draw_view(policy_ptr, ints_ptr, floats_ptr, seed, epoch, index, view, image_height, image_width, write)
        )
    else:
        top, left, height, width, plan, contrast_at, hue_levels, brightness, saturation, flip, grey_before, sigma = (
            load_view(ints_ptr, floats_ptr)
        )
    if tl.program_id(0) == 0:
        tl.store(taps_ptr + n * _NUM_TAPS + tl.arange(0, _NUM_TAPS), _blur_taps(sigma))
    row_bytes = image_width.to(tl.int64) * 3
    base_ptr = pixels_ptr + tl.load(offset_ptr + n % B) + top.to(tl.int64) * row_bytes + left.to(tl.int64) * 3
    planes_ptr += n * (3 * S * S)
    across = tl.cdiv(S, BLOCK)
    start = tl.program_id(0) * tiles_per_program
    for tile in range(start, tl.minimum(start + tiles_per_program, tiles)):
        y = ((tile // across) * BLOCK + tl.arange(0, BLOCK))[:, None]
        x = ((tile % across) * BLOCK + tl.arange(0, BLOCK))[None, :]
        source_x = tl.minimum(x, S - 1)
        source_x = tl.where(flip != 0, S - 1 - source_x, source_x)
        red, green, blue = _resized(base_ptr, row_bytes, height, width, tl.minimum(y, S - 1), source_x, S, BLOCK)
        if grey_before != 0:
            grey = luma(red, green, blue)
            red, green, blue = grey, grey, grey
        red, green, blue = jitter(
            red, green, blue, plan, 0, contrast_at, brightness, 1.0, saturation, hue_levels.to(tl.float32), 0.0
        )
        valid = (y < S) & (x < S)
        total = tl.sum(tl.where(valid, luma(red, green, blue), 0.0).to(tl.int32))
        tl.store(luma_ptr + n * tiles + tile, total)
        at_ptr = planes_ptr + y * S + x
        tl.store(at_ptr, red.to(tl.int32).to(tl.uint8), mask=valid)
        tl.store(at_ptr + S * S, green.to(tl.int32).to(tl.uint8), mask=valid)
        tl.store(at_ptr + 2 * S * S, blue.to(tl.int32).to(tl.uint8), mask=valid)
