"""A view's parameters, drawn inside launch one: the same bits as `sample_params` of fastssl/augment/params.py.

Draw d is word d % 4 of block d // 4 in stream `view` of the Philox generator keyed by (seed, epoch, index). The
arithmetic is the reference's, in the same order: float64 sums, products, quotients and square roots, never fused, which
IEEE rounds alike everywhere. A policy reaches the kernel as numbers (`POLICY_FIELDS`), so one kernel serves them all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import views_table as table

_ROUND64 = tl.constexpr(1.5 * 2**52)  # x + this - this rounds |x| < 2^51 to the nearest whole number, half to even
_CROP_TRIES = tl.constexpr(10)
_LANES = tl.constexpr(16)  # for the tries, which are made side by side: a power of two


@triton.jit
def round_even64(x):
    return (x + _ROUND64) - _ROUND64


@triton.jit
def _uniform(word):
    """The top 24 bits of a word as a float64 in [0, 1)."""
    return (word >> 8).to(tl.int32).to(tl.float64) * (1 / 16777216)


@triton.jit
def _draw4(seed, low, high, epoch, view, block):
    """Draws number 4 * block to 4 * block + 3."""
    a, b, c, d = tl.philox(seed, low, high, epoch, block | (view << 16))
    return _uniform(a), _uniform(b), _uniform(c), _uniform(d)


@triton.jit
def _draw_at(seed, low, high, epoch, view, draw):
    """The draws with these numbers."""
    a, b, c, d = _draw4(seed, low, high, epoch, view, draw // 4)
    word = draw % 4
    return tl.where(word == 0, a, tl.where(word == 1, b, tl.where(word == 2, c, d)))


@triton.jit
def _exp(x):
    """`exact_exp` of the reference: a Taylor series and squarings."""
    x = x * (1 / 64)
    power = x * 0.0 + 1.0
    for n in tl.static_range(12, 0, -1):
        power = power * x * (1 / n) + 1.0
    for _ in tl.static_range(6):
        power = power * power
    return power


@triton.jit
def _random_sides(policy_ptr, seed, low, high, epoch, view, height, width):
    """(height, width) of the first of ten tries that fits, else the largest one within the ratios; whether one fits."""
    lane = tl.arange(0, _LANES)
    u_area = _draw_at(seed, low, high, epoch, view, lane)
    u_ratio = _draw_at(seed, low, high, epoch, view, lane + _CROP_TRIES)
    area = u_area * tl.load(policy_ptr + table.AREA_SPAN) + tl.load(policy_ptr + table.AREA_LOW)
    log_ratio = u_ratio * tl.load(policy_ptr + table.LOG_RATIO_SPAN) + tl.load(policy_ptr + table.LOG_RATIO_LOW)
    side, root_ratio = tl.sqrt(height * width * area), _exp(log_ratio * 0.5)
    w, h = round_even64(side * root_ratio), round_even64(side / root_ratio)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height) & (lane < _CROP_TRIES)
    first = tl.min(tl.where(fits, lane, _LANES), 0)
    found = first < _LANES
    ratio_low, ratio_high = tl.load(policy_ptr + table.RATIO_LOW), tl.load(policy_ptr + table.RATIO_HIGH)
    narrow = round_even64(width * tl.load(policy_ptr + table.RATIO_LOW_INVERSE))
    widest = tl.maximum(tl.where(width > height * ratio_high, round_even64(height * ratio_high), width), 1.0)
    highest = tl.maximum(tl.where(width < height * ratio_low, narrow, height), 1.0)
    crop_height = tl.where(found, tl.sum(tl.where(lane == first, h, 0.0), 0), highest)
    crop_width = tl.where(found, tl.sum(tl.where(lane == first, w, 0.0), 0), widest)
    return crop_height, crop_width, found


@triton.jit
def _factor(u, low, span):
    """The factor of a blend, rounded to a multiple of 2^-13."""
    return (round_even64((u * span + low) * 8192.0) * (1 / 8192)).to(tl.float32)


@triton.jit
def _kept(operation, jitter, brightness, contrast, saturation, hue):
    """The number of an operation, or 7 if it would change nothing."""
    changes = (operation == 0) & (brightness != 1.0) | (operation == 1) & (contrast != 1.0)
    changes = changes | (operation == 2) & (saturation != 1.0) | (operation == 3) & (hue != 0.0)
    return tl.where(jitter & changes, operation, 7)


@triton.jit
def _plan(order, jitter, brightness, contrast, saturation, hue):
    """Permutation `order` (0..23) of the four operations, three bits each; and the place of contrast, 4 without it."""
    first, rest = order // 6, order % 6
    second = rest // 2
    second += (second >= first).to(tl.int32)
    third = rest % 2
    third += (third >= tl.minimum(first, second)).to(tl.int32)
    third += (third >= tl.maximum(first, second)).to(tl.int32)
    fourth = 6 - first - second - third
    first = _kept(first, jitter, brightness, contrast, saturation, hue)
    second = _kept(second, jitter, brightness, contrast, saturation, hue)
    third = _kept(third, jitter, brightness, contrast, saturation, hue)
    fourth = _kept(fourth, jitter, brightness, contrast, saturation, hue)
    contrast_at = tl.where(third == 1, 2, tl.where(fourth == 1, 3, 4))
    contrast_at = tl.where(first == 1, 0, tl.where(second == 1, 1, contrast_at))
    return first | (second << 3) | (third << 6) | (fourth << 9), contrast_at


@triton.jit
def draw_view(policy_ptr, ints_ptr, floats_ptr, seed, epoch, index, view, height, width, write):
    """Draws one view's parameters. Returns those that launch one needs; if `write`, stores all in the view's row."""
    low, high = (index & 0xFFFFFFFF).to(tl.uint32), (index >> 32).to(tl.uint32)
    seed, epoch, view = seed.to(tl.int64), epoch.to(tl.uint32), view.to(tl.int32)
    u_top, u_left, u_flip, u_jitter = _draw4(seed, low, high, epoch, view, 5)
    u_order, u_brightness, u_contrast, u_saturation = _draw4(seed, low, high, epoch, view, 6)
    u_hue, u_grey, u_blur, u_sigma = _draw4(seed, low, high, epoch, view, 7)
    u_solarise, u_cells, u_key, _ = _draw4(seed, low, high, epoch, view, 8)

    height, width = height.to(tl.float64), width.to(tl.float64)
    crop_height, crop_width, found = _random_sides(policy_ptr, seed, low, high, epoch, view, height, width)
    square = tl.load(policy_ptr + table.CENTRAL) != 0.0
    crop_height = tl.where(square, tl.minimum(height, width), crop_height)
    crop_width = tl.where(square, tl.minimum(height, width), crop_width)
    rows, columns, free = height - crop_height, width - crop_width, found & (square == 0)
    top = tl.where(free, u_top * (rows + 1.0), rows * 0.5).to(tl.int32)
    left = tl.where(free, u_left * (columns + 1.0), columns * 0.5).to(tl.int32)
    crop_height, crop_width = crop_height.to(tl.int32), crop_width.to(tl.int32)

    flip = (u_flip < tl.load(policy_ptr + table.FLIP_P)).to(tl.int32)
    grey, grey_first = u_grey < tl.load(policy_ptr + table.GREY_P), tl.load(policy_ptr + table.GREY_FIRST) != 0.0
    grey_before = (grey & grey_first).to(tl.int32)
    brightness = _factor(
        u_brightness, tl.load(policy_ptr + table.BRIGHTNESS_LOW), tl.load(policy_ptr + table.BRIGHTNESS_SPAN)
    )
    contrast = _factor(u_contrast, tl.load(policy_ptr + table.CONTRAST_LOW), tl.load(policy_ptr + table.CONTRAST_SPAN))
    saturation = _factor(
        u_saturation, tl.load(policy_ptr + table.SATURATION_LOW), tl.load(policy_ptr + table.SATURATION_SPAN)
    )
    hue = (u_hue * tl.load(policy_ptr + table.HUE_SPAN) + tl.load(policy_ptr + table.HUE_LOW)).to(tl.float32)
    hue_levels = (hue * 255.0).to(tl.int32)
    jitter = u_jitter < tl.load(policy_ptr + table.JITTER_P)
    plan, contrast_at = _plan((u_order * 24.0).to(tl.int32), jitter, brightness, contrast, saturation, hue)
    sigma = (u_sigma * tl.load(policy_ptr + table.SIGMA_SPAN) + tl.load(policy_ptr + table.SIGMA_LOW)).to(tl.float32)
    if write:
        grid = (u_cells * 4.0).to(tl.int32)  # 0, 1, 2, 3 -> 0, 16, 8, 4 cells
        hides = (grid > 0) & (tl.load(policy_ptr + table.HIDE_AND_SEEK) != 0.0)
        tl.store(ints_ptr + table.TOP, top)
        tl.store(ints_ptr + table.LEFT, left)
        tl.store(ints_ptr + table.CROP_HEIGHT, crop_height)
        tl.store(ints_ptr + table.CROP_WIDTH, crop_width)
        tl.store(ints_ptr + table.FLIP, flip)
        tl.store(ints_ptr + table.GREY_BEFORE, grey_before)
        tl.store(ints_ptr + table.PLAN, plan)
        tl.store(ints_ptr + table.CONTRAST_AT, contrast_at)
        tl.store(ints_ptr + table.HUE_LEVELS, hue_levels)
        tl.store(ints_ptr + table.GREY_AFTER, (grey & (grey_first == 0)).to(tl.int32))
        tl.store(ints_ptr + table.BLUR, (u_blur < tl.load(policy_ptr + table.BLUR_P)).to(tl.int32))
        tl.store(ints_ptr + table.SOLARISE, (u_solarise < tl.load(policy_ptr + table.SOLARISE_P)).to(tl.int32))
        tl.store(ints_ptr + table.HIDE_CELLS, tl.where(hides, 32 >> grid, 0))
        tl.store(ints_ptr + table.HIDE_KEY, (u_key * 16777216.0).to(tl.int32))
        tl.store(floats_ptr + table.BRIGHTNESS, brightness)
        tl.store(floats_ptr + table.CONTRAST, contrast)
        tl.store(floats_ptr + table.SATURATION, saturation)
        tl.store(floats_ptr + table.SIGMA, sigma)
        tl.store(floats_ptr + table.HIDE_P, tl.load(policy_ptr + table.HIDE_PROBABILITY).to(tl.float32))
    height, width = crop_height, crop_width  # one flat tuple follows: Triton 3.2 cannot return tuples within tuples
    return top, left, height, width, plan, contrast_at, hue_levels, brightness, saturation, flip, grey_before, sigma


@triton.jit
def load_view(ints_ptr, floats_ptr):
    """What `draw_view` returns, read from the view's row in the tables."""
    top, left = tl.load(ints_ptr + table.TOP), tl.load(ints_ptr + table.LEFT)
    height, width = tl.load(ints_ptr + table.CROP_HEIGHT), tl.load(ints_ptr + table.CROP_WIDTH)
    plan, contrast_at = tl.load(ints_ptr + table.PLAN), tl.load(ints_ptr + table.CONTRAST_AT)
    hue_levels, brightness = tl.load(ints_ptr + table.HUE_LEVELS), tl.load(floats_ptr + table.BRIGHTNESS)
    saturation, sigma = tl.load(floats_ptr + table.SATURATION), tl.load(floats_ptr + table.SIGMA)
    flip, grey_before = tl.load(ints_ptr + table.FLIP), tl.load(ints_ptr + table.GREY_BEFORE)
    return top, left, height, width, plan, contrast_at, hue_levels, brightness, saturation, flip, grey_before, sigma
