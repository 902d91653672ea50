"""Compiled CPU loops for everything after the crop: the arithmetic of `color`, `jitter` and `blur` on planes of bytes.

Every step of the reference is exact in float32 (color.py, blur.py), so these loops give the same bits. They use vector
registers, and keep the pixels of a view in the cache.

Shapes: n views, S pixels a side, P = S * S.
"""

from __future__ import annotations

import numpy as np

from fastssl.augment.color import SECTOR_UNIT
from fastssl.machine.compiled import compiled

F = np.float32
_RED, _GREEN, _BLUE = F(19595 / 65536), F(38470 / 65536), F(7471 / 65536)  # Pillow's luma
_UNIT = F(SECTOR_UNIT)
_ZERO, _HALF, _QUARTER, _ONE, _TWO, _FOUR, _SIX, _WHITE = F(0), F(0.5), F(0.25), F(1), F(2), F(4), F(6), F(255)
_SECTOR, _HUES, _PER_HUE = F(42.5), F(256), F(1 / 256)
_RED_LEVEL, _GREEN_LEVEL, _BLUE_LEVEL = F(127.5), F(85), F(170)
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)


@compiled(inline=True)
def _luma(red, green, blue):
    return np.floor(_RED * F(red) + _GREEN * F(green) + _BLUE * F(blue) + _HALF)


@compiled(inline=True)
def _to_byte(x):
    return np.uint8(min(max(x, _ZERO), _WHITE))


@compiled
def _take_planes(pixels, flip, planes):
    """Copies pixels (S, S, 3) uint8, mirrored if `flip`, to planes (3, P)."""
    size = pixels.shape[0]
    for y in range(size):
        row, red = pixels[y], planes[0, y * size : (y + 1) * size]
        green, blue = planes[1, y * size : (y + 1) * size], planes[2, y * size : (y + 1) * size]
        if flip:
            for x in range(size):
                at = size - 1 - x
                red[x], green[x], blue[x] = row[at, 0], row[at, 1], row[at, 2]
        else:
            for x in range(size):
                red[x], green[x], blue[x] = row[x, 0], row[x, 1], row[x, 2]


@compiled
def _turn_grey(planes):
    red, green, blue = planes[0], planes[1], planes[2]
    for i in range(len(red)):
        grey = np.uint8(_luma(red[i], green[i], blue[i]))
        red[i], green[i], blue[i] = grey, grey, grey


@compiled
def _mean_luma(planes):
    """The mean luma, rounded to a whole number."""
    red, green, blue = planes[0], planes[1], planes[2]
    total = 0
    for i in range(len(red)):
        total += np.int64(_luma(red[i], green[i], blue[i]))
    return F((2 * total + len(red)) // (2 * len(red)))


@compiled
def _blend(planes, anchor, factor):
    """Scales the difference from the grey level `anchor` by `factor`."""
    rest = anchor * (_ONE - factor)
    for plane in planes:
        for i in range(len(plane)):
            plane[i] = _to_byte(F(plane[i]) * factor + rest)


@compiled
def _saturate(planes, factor):
    red, green, blue = planes[0], planes[1], planes[2]
    for i in range(len(red)):
        rest = _luma(red[i], green[i], blue[i]) * (_ONE - factor)
        red[i] = _to_byte(F(red[i]) * factor + rest)
        green[i] = _to_byte(F(green[i]) * factor + rest)
        blue[i] = _to_byte(F(blue[i]) * factor + rest)


@compiled(inline=True)
def _hue_channel(distance, base, scaled):
    below = min(max(distance, _SECTOR), _GREEN_LEVEL)
    return np.uint8(np.rint((base - below * scaled) / _UNIT))


@compiled
def _turn_hue(planes, levels):
    red, green, blue = planes[0], planes[1], planes[2]
    for i in range(len(red)):
        r, g, b = F(red[i]), F(green[i]), F(blue[i])
        high, low = max(g, b), min(g, b)
        value = max(r, high)
        chroma = value - min(r, low)
        sector = min(max(b - g, _ZERO), _ONE) * -_SIX
        sector += min(max(value - r, _ZERO), _ONE) * (-_TWO - _TWO * sector)
        hue = abs(min(r, high) - low + sector * chroma) * _SECTOR
        hue = np.floor(hue / max(chroma, _ONE)) + levels
        hue -= _HUES * np.floor(hue * _PER_HUE)
        scaled = np.floor(chroma * _WHITE / max(value, _ONE)) * value
        base = value * _UNIT + _SECTOR * scaled
        red[i] = _hue_channel(_RED_LEVEL - abs(hue - _RED_LEVEL), base, scaled)
        green[i] = _hue_channel(abs(hue - _GREEN_LEVEL), base, scaled)
        blue[i] = _hue_channel(abs(hue - _BLUE_LEVEL), base, scaled)


@compiled
def _jitter(planes, plan, factors, levels):
    """plan: four operations of three bits each, the first in the lowest bits, as in `kernels/views_table.py`."""
    for place in range(4):
        operation = (plan >> (3 * place)) & 7
        if operation == _BRIGHTNESS:
            _blend(planes, _ZERO, factors[_BRIGHTNESS])
        elif operation == _CONTRAST:
            _blend(planes, _mean_luma(planes), factors[_CONTRAST])
        elif operation == _SATURATION:
            _saturate(planes, factors[_SATURATION])
        elif operation == _HUE:
            _turn_hue(planes, levels)


@compiled
def _blur(plane, taps, quarters, line):
    """Blurs plane (S, S) uint8 with taps (radius + 1,); quarters (S, S), line (S + 2 * radius,): float32 scratch."""
    size, radius = plane.shape[0], len(taps) - 1
    for y in range(size):
        row, total = plane[y], quarters[y]
        line[:radius], line[radius + size :] = F(row[0]), F(row[size - 1])
        for x in range(size):
            line[radius + x] = F(row[x])
            total[x] = taps[0] * F(row[x])
        for k in range(1, radius + 1):
            before, behind = line[radius - k : radius - k + size], line[radius + k : radius + k + size]
            for x in range(size):
                total[x] += taps[k] * (before[x] + behind[x])
        for x in range(size):
            total[x] = np.rint(total[x] * _FOUR)
    total = line[:size]
    for y in range(size):
        row = quarters[y]
        for x in range(size):
            total[x] = taps[0] * row[x]
        for k in range(1, radius + 1):
            above, below = quarters[max(y - k, 0)], quarters[min(y + k, size - 1)]
            for x in range(size):
                total[x] += taps[k] * (above[x] + below[x])
        for x in range(size):
            plane[y, x] = np.uint8(np.rint(total[x] * _QUARTER))


@compiled
def _solarise(planes):
    for plane in planes:
        for i in range(len(plane)):
            plane[i] = plane[i] if plane[i] < 128 else 255 - plane[i]


@compiled
def _finish_view(pixels, ints, factors, taps, levels, view):
    size = pixels.shape[0]
    flip, grey_before, plan, hue_levels, grey_after, blur, solarise = ints
    planes = np.empty((3, size * size), np.uint8)
    _take_planes(pixels, flip, planes)
    if grey_before:
        _turn_grey(planes)
    _jitter(planes, plan, factors, F(hue_levels))
    if grey_after:
        _turn_grey(planes)
    if blur:
        reach = np.count_nonzero(taps)
        quarters, line = np.empty((size, size), np.float32), np.empty(size + 2 * (reach - 1), np.float32)
        for channel in range(3):
            _blur(planes[channel].reshape(size, size), taps[:reach], quarters, line)
    if solarise:
        _solarise(planes)
    for i in range(size * size):
        for channel in range(3):
            view[i, channel] = levels[channel, planes[channel, i]]


@compiled
def finish_views(pixels, ints, factors, taps, levels, views):
    """Applies all operations after the crop to n crops, pixels (n, S, S, 3) uint8; writes views (n, P, 3).

    ints (n, 7) int32: flip, grey_before, plan, hue levels, grey_after, blur, solarise. factors (n, 3) float32. taps
    (n, R) float32, with zeros at the end. levels (3, 256): the normalised value of each byte of a channel, as integers
    with the bits of the views' dtype.
    """
    for i in range(len(views)):
        _finish_view(pixels[i], ints[i], factors[i], taps[i], levels, views[i])
