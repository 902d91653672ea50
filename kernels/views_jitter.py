"""Launch two of the views: contrast and what follows it in the jitter, greyscale, and the blur along rows.

A program owns whole rows of a view, because the blur needs the neighbours to the left and right: after a barrier, the
program can read those that it has just written itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .views_color import jitter, luma, round_even
from .views_table import (
    BLUR,
    BRIGHTNESS,
    CONTRAST,
    CONTRAST_AT,
    FLOATS,
    GREY_AFTER,
    HUE_LEVELS,
    INTS,
    NUM_TAPS,
    PLAN,
    SATURATION,
    SIGMA,
)

_NUM_TAPS = tl.constexpr(NUM_TAPS)


@triton.jit
def _update_colours(planes_ptr, ints_ptr, floats_ptr, mean, first, stop, plane, BLOCK: tl.constexpr):
    """Applies the jitter from contrast on, and greyscale, to pixels first <= i < stop of three planes."""
    plan, contrast_at = tl.load(ints_ptr + PLAN), tl.load(ints_ptr + CONTRAST_AT)
    brightness, contrast = tl.load(floats_ptr + BRIGHTNESS), tl.load(floats_ptr + CONTRAST)
    saturation, hue_levels = tl.load(floats_ptr + SATURATION), tl.load(ints_ptr + HUE_LEVELS).to(tl.float32)
    grey_after = tl.load(ints_ptr + GREY_AFTER)
    for start in range(first, stop, BLOCK):
        at = start + tl.arange(0, BLOCK)
        valid = at < stop
        red = tl.load(planes_ptr + at, mask=valid, other=0).to(tl.float32)
        green = tl.load(planes_ptr + plane + at, mask=valid, other=0).to(tl.float32)
        blue = tl.load(planes_ptr + 2 * plane + at, mask=valid, other=0).to(tl.float32)
        red, green, blue = jitter(
            red, green, blue, plan, contrast_at, 4, brightness, contrast, saturation, hue_levels, mean
        )
        if grey_after != 0:
            grey = luma(red, green, blue)
            red, green, blue = grey, grey, grey
        tl.store(planes_ptr + at, red.to(tl.int32).to(tl.uint8), mask=valid)
        tl.store(planes_ptr + plane + at, green.to(tl.int32).to(tl.uint8), mask=valid)
        tl.store(planes_ptr + 2 * plane + at, blue.to(tl.int32).to(tl.uint8), mask=valid)


@triton.jit
def _blur_rows(planes_ptr, rows_ptr, taps_ptr, sigma, first, stop, plane, S, BLOCK: tl.constexpr):
    """Blurs pixels first <= i < stop along rows, in quarters of a grey level; edges are repeated."""
    radius = (4.0 * sigma).to(tl.int32)  # taps reach to 4 sigma
    for start in range(first, stop, BLOCK):
        at = start + tl.arange(0, BLOCK)
        valid = at < stop
        x = at % S
        row = at - x
        for channel in range(3):
            plane_ptr = planes_ptr + channel * plane
            total = tl.load(plane_ptr + at, mask=valid, other=0).to(tl.float32) * tl.load(taps_ptr)
            for k in range(1, radius + 1):
                left = tl.load(plane_ptr + row + tl.maximum(x - k, 0), mask=valid, other=0).to(tl.float32)
                right = tl.load(plane_ptr + row + tl.minimum(x + k, S - 1), mask=valid, other=0).to(tl.float32)
                total += (left + right) * tl.load(taps_ptr + k)
            tl.store(rows_ptr + channel * plane + at, round_even(total * 4.0).to(tl.int32).to(tl.int16), mask=valid)


@triton.jit
def jitter_rows(
    planes_ptr,  # (N, 3, S, S) uint8, updated
    rows_ptr,  # (N, 3, S, S) int16, result if the view is blurred: quarters of a grey level
    luma_ptr,  # (N, tiles) int32
    taps_ptr,  # (N, NUM_TAPS) float32
    ints_ptr,  # (N, INTS) int32
    floats_ptr,  # (N, FLOATS) float32
    S,
    tiles,
    rows_per_program,
    BLOCK: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """One program: rows_per_program rows of one view."""
    n = tl.program_id(1).to(tl.int64)
    plane = S * S
    planes_ptr += n * (3 * plane)
    ints_ptr += n * INTS
    floats_ptr += n * FLOATS
    first = tl.program_id(0) * rows_per_program * S
    stop = tl.minimum(first + rows_per_program * S, plane)
    if (tl.load(ints_ptr + CONTRAST_AT) < 4) | (tl.load(ints_ptr + GREY_AFTER) != 0):
        tile = tl.arange(0, BLOCK_TILES)
        total = tl.sum(tl.load(luma_ptr + n * tiles + tile, mask=tile < tiles, other=0).to(tl.int64))
        mean = ((2 * total + plane) // (2 * plane)).to(tl.float32)  # rounded half up, as Pillow rounds it
        _update_colours(planes_ptr, ints_ptr, floats_ptr, mean, first, stop, plane, BLOCK)
    if tl.load(ints_ptr + BLUR) != 0:
        tl.debug_barrier()  # from here on, all rows of this program have been written
        rows_ptr += n * (3 * plane)
        taps_ptr += n * _NUM_TAPS
        _blur_rows(planes_ptr, rows_ptr, taps_ptr, tl.load(floats_ptr + SIGMA), first, stop, plane, S, BLOCK)
