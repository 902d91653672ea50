"""Compiled CPU loops that resize boxes, with the bits of `resample_reference`, which are Pillow's.

(torch's own loops for bytes take half the time, but some of their pixels differ from Pillow's by 2.) For the pass along
rows, sixteen rows are interleaved so that sums fill vector registers; the pass across rows needs no such step.

Shapes: L pixels along a side of the box, S outputs, T taps per output.
"""

from __future__ import annotations

import numpy as np

from fastssl.augment.resample import PRECISION_BITS
from fastssl.machine.compiled import compiled

_HALF = np.int32(1 << (PRECISION_BITS - 1))
_ROWS = 16  # a vector register of sums
_ONE = float(1 << PRECISION_BITS)


@compiled
def _axis_taps(length, size):
    """`resample.axis_taps` for a box of `length` pixels: first (S,), count (S,) and weight (S, T), all int32."""
    scale = length / size
    support = max(scale, 1.0)
    first, count = np.empty(size, np.int32), np.empty(size, np.int32)
    weight, share = np.zeros((size, 2 * int(np.ceil(support)) + 1), np.int32), np.empty(2 * int(np.ceil(support)) + 1)
    for out in range(size):
        centre = (out + 0.5) * scale
        begin = max(int(centre - support + 0.5), 0)
        first[out], count[out] = begin, min(int(centre + support + 0.5), length) - begin
        total = 0.0
        for t in range(count[out]):
            share[t] = max(1.0 - abs(((begin + t) - centre + 0.5) / support), 0.0)
            total += share[t]
        for t in range(count[out]):
            weight[out, t] = int(np.floor(share[t] / total * _ONE + 0.5))
    return first, count, weight


@compiled(inline=True)
def _to_byte(total):
    return np.uint8(min(max(np.int32(total) >> PRECISION_BITS, 0), 255))


@compiled
def _resize_rows(lanes, first, count, weight, total, rows):
    """Resizes _ROWS interleaved rows: lanes (3 * L, _ROWS) to rows (_ROWS, 3 * S), both uint8."""
    flat = lanes.reshape(lanes.size)
    for x in range(len(first)):
        total[:] = _HALF
        for t in range(count[x]):
            start, w = 3 * _ROWS * (first[x] + t), weight[x, t]
            pixel = flat[start : start + 3 * _ROWS]
            for i in range(3 * _ROWS):
                total[i] += w * np.int32(pixel[i])
        for channel in range(3):
            for y in range(_ROWS):
                rows[y, 3 * x + channel] = _to_byte(total[channel * _ROWS + y])


@compiled
def _resize_columns(rows, first, count, weight, out):
    """Resizes across rows: rows (L, 3 * S) to out (S, 3 * S), both uint8."""
    total = np.empty(rows.shape[1], np.int32)
    for y in range(len(first)):
        total[:] = _HALF
        for t in range(count[y]):
            row, w = rows[first[y] + t], weight[y, t]
            for i in range(len(row)):
                total[i] += w * np.int32(row[i])
        row = out[y]
        for i in range(len(row)):
            row[i] = _to_byte(total[i])


@compiled
def _resize_box(pixels, offset, width, box, out):
    top, left, box_height, box_width = box
    size, padded = len(out), -(-box_height // _ROWS) * _ROWS
    rows, lanes = np.empty((padded, 3 * size), np.uint8), np.empty((3 * box_width, _ROWS), np.uint8)
    first, count, weight = _axis_taps(box_width, size)
    total = np.empty(3 * _ROWS, np.int32)
    for begin in range(0, box_height, _ROWS):
        for y in range(min(_ROWS, box_height - begin)):
            start = offset + 3 * ((top + begin + y) * width + left)
            row = pixels[start : start + 3 * box_width]
            for i in range(len(row)):
                lanes[i, y] = row[i]
        _resize_rows(lanes, first, count, weight, total, rows[begin : begin + _ROWS])
    first, count, weight = _axis_taps(box_height, size)
    _resize_columns(rows, first, count, weight, out.reshape(size, 3 * size))


@compiled
def resize_boxes(pixels, offset, width, boxes, out):
    """Resizes a box of each of n images to out (n, S, S, 3) uint8.

    pixels (bytes,) uint8: image i begins at offset[i] (int64) and has width[i] (int32) columns. boxes (n, 4) int32:
    top, left, height and width, which must be inside the image.
    """
    for i in range(len(out)):
        _resize_box(pixels, offset[i], width[i], boxes[i], out[i])
