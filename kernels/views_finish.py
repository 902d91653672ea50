"""Launch three of the views: blur along columns, solarise, normalise and hide-and-seek, in the encoder's format."""

from __future__ import annotations

import triton
import triton.language as tl

from .views_color import round_even
from .views_table import BLUR, FLOATS, HIDE_CELLS, HIDE_KEY, HIDE_P, INTS, NUM_TAPS, SIGMA, SOLARISE

_NUM_TAPS = tl.constexpr(NUM_TAPS)


@triton.jit
def _blur_columns(rows_ptr, taps_ptr, radius, y, x, valid, S):
    """Blurs along columns what launch two blurred along rows (in quarters): bytes by channel; edges are repeated."""
    tap, at = tl.load(taps_ptr), y * S + x
    red = tl.load(rows_ptr + at, mask=valid, other=0).to(tl.float32) * tap
    green = tl.load(rows_ptr + S * S + at, mask=valid, other=0).to(tl.float32) * tap
    blue = tl.load(rows_ptr + 2 * S * S + at, mask=valid, other=0).to(tl.float32) * tap
    for k in range(1, radius + 1):  # six loads at a time, since they wait for memory
        tap = tl.load(taps_ptr + k)
        above, below = rows_ptr + tl.maximum(y - k, 0) * S + x, rows_ptr + tl.minimum(y + k, S - 1) * S + x
        red += _sum_of(above, below, valid) * tap
        green += _sum_of(above + S * S, below + S * S, valid) * tap
        blue += _sum_of(above + 2 * S * S, below + 2 * S * S, valid) * tap
    return round_even(red * 0.25), round_even(green * 0.25), round_even(blue * 0.25)


@triton.jit
def _sum_of(above, below, valid):
    """The sum of the pixels at two places, as float32."""
    return tl.load(above, mask=valid, other=0).to(tl.float32) + tl.load(below, mask=valid, other=0).to(tl.float32)


@triton.jit
def _shown(y, x, S, cells, key, probability):
    """Whether hide-and-seek shows pixel (y, x); see `update_hide` in fastssl/augment/hide.py."""
    row, column = y * cells // S + x * 0, x * cells // S + y * 0
    zero = row * 0
    word, _, _, _ = tl.philox(zero.to(tl.int64) * 0, row, column, zero + key, zero)
    return (word >> 8).to(tl.float32) * (1.0 / 16777216) >= probability


@triton.jit
def finish_tiles(
    planes_ptr,  # (N, 3, S, S) uint8
    rows_ptr,  # (N, 3, S, S) int16, read where a view is blurred
    taps_ptr,  # (N, NUM_TAPS) float32
    ints_ptr,  # (N, INTS) int32
    floats_ptr,  # (N, FLOATS) float32
    out_ptr,  # (N, S, S, 3) float32, float16 or bfloat16, result; (N / 2, S, S, 3) beside keys_ptr
    keys_ptr,  # (N / 2, S, S, 3) uint8, result: the second half of the views, neither normalised nor hidden; or None
    S,
    # normalised = (byte - mean) * scale, channel by channel
    mean0,
    mean1,
    mean2,
    scale0,
    scale1,
    scale2,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK x BLOCK pixels of one view."""
    n = tl.program_id(1).to(tl.int64)
    plane = S * S
    across = tl.cdiv(S, BLOCK)
    y = ((tl.program_id(0) // across) * BLOCK + tl.arange(0, BLOCK))[:, None]
    x = ((tl.program_id(0) % across) * BLOCK + tl.arange(0, BLOCK))[None, :]
    valid = (y < S) & (x < S)
    planes_ptr += n * (3 * plane)
    rows_ptr += n * (3 * plane)
    out_ptr += n * (3 * plane)
    taps_ptr += n * _NUM_TAPS
    ints_ptr += n * INTS
    floats_ptr += n * FLOATS
    blur, solarise, cells = tl.load(ints_ptr + BLUR), tl.load(ints_ptr + SOLARISE), tl.load(ints_ptr + HIDE_CELLS)
    radius = (4.0 * tl.load(floats_ptr + SIGMA)).to(tl.int32)
    factor = tl.full([BLOCK, BLOCK], 1.0, tl.float32)
    if cells != 0:
        factor = _shown(y, x, S, cells, tl.load(ints_ptr + HIDE_KEY), tl.load(floats_ptr + HIDE_P)).to(tl.float32)
    if blur != 0:
        red, green, blue = _blur_columns(rows_ptr, taps_ptr, radius, y, x, valid, S)
    else:
        at_ptr = planes_ptr + y * S + x
        red = tl.load(at_ptr, mask=valid, other=0).to(tl.float32)
        green = tl.load(at_ptr + plane, mask=valid, other=0).to(tl.float32)
        blue = tl.load(at_ptr + 2 * plane, mask=valid, other=0).to(tl.float32)
    if solarise != 0:
        red = tl.where(red < 128.0, red, 255.0 - red)
        green = tl.where(green < 128.0, green, 255.0 - green)
        blue = tl.where(blue < 128.0, blue, 255.0 - blue)
    if keys_ptr is not None:
        half = tl.num_programs(1) // 2
        end = tl.where(n < half, 0, S)  # rows above it stay bytes; of a scalar, Triton 3.9's interpreter makes no mask
        raw, valid = valid & (y < end), valid & (y >= end)
        keys_ptr += (n - half) * (3 * plane) + (y * S + x) * 3
        tl.store(keys_ptr, red.to(tl.int32).to(tl.uint8), mask=raw)
        tl.store(keys_ptr + 1, green.to(tl.int32).to(tl.uint8), mask=raw)
        tl.store(keys_ptr + 2, blue.to(tl.int32).to(tl.uint8), mask=raw)
    out_ptr += (y * S + x) * 3
    tl.store(out_ptr, ((red - mean0) * scale0 * factor).to(out_ptr.dtype.element_ty), mask=valid)
    tl.store(out_ptr + 1, ((green - mean1) * scale1 * factor).to(out_ptr.dtype.element_ty), mask=valid)
    tl.store(out_ptr + 2, ((blue - mean2) * scale2 * factor).to(out_ptr.dtype.element_ty), mask=valid)
