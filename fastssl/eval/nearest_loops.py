"""The compiled loops of `nearest_cpu`; none holds the GIL, so that threads can share the rows.

Arguments that have a row for each query, or for each row that is encoded, come first, then what all of them need.

Shapes: n queries, m rows of a block, C feature dimensions, K neighbours, R places for the rows kept for a query.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from fastssl.compiled import compiled

_LANES = 16  # columns compared at once: most groups hold nothing near and are passed over


# sums in the order of vector registers: always the same one, but not that of the source
_reordered = partial(compiled, fastmath={"reassoc", "contract"})


@_reordered
def quantise(rows, codes, scale, norm, error, centre):
    """rows (m, C) less centre (C,), as scale (m,) * codes (m, C) int8; norm, error (m,): of them, of what is left."""
    for i in range(len(rows)):
        largest, square, left = 0.0, 0.0, 0.0
        for c in range(rows.shape[1]):
            x = rows[i, c] - centre[c]
            largest = max(largest, abs(x))
            square += x * x
        step = largest / 127 if largest > 0 else 1.0
        for c in range(rows.shape[1]):
            x = rows[i, c] - centre[c]
            code = np.rint(x / step)
            codes[i, c] = np.int8(code)
            left += (x - step * code) ** 2
        scale[i], norm[i], error[i] = step, np.sqrt(square), np.sqrt(left)


@compiled
def _smallest_of_groups(lanes, smallest):
    """smallest (groups,): column by column of lanes (L, groups), by whole vectors."""
    smallest[:] = lanes[0]
    for lane in range(1, len(lanes)):
        for group in range(len(smallest)):
            value = lanes[lane, group]
            smallest[group] = value if value < smallest[group] else smallest[group]


@compiled
def sample_limits(product, query, limit, expected, row, rank):
    """limit (n,): about the rank-th smallest of the estimates; expected (n,): how many columns' bounds are within it.

    product (n, m) of codes; query (n, 3) and row (4, m): as `nearest_cpu.Coded` has them.
    """
    columns = product.shape[1]
    square, step, error, norm = row[0], row[1], row[2], row[3]
    bound, estimate = np.empty(columns, np.float32), np.empty(columns, np.float32)
    groups = columns // _LANES
    lanes, smallest = estimate[: groups * _LANES].reshape(_LANES, groups), np.empty(groups, np.float32)
    for i in range(len(product)):
        scale, alpha, beta, p = query[i, 0], query[i, 1], query[i, 2], product[i]
        for j in range(columns):
            estimate[j] = square[j] + scale * step[j] * np.float32(p[j])
            bound[j] = estimate[j] - alpha * error[j] - beta * norm[j]
        if rank <= groups // 4:  # few of them share a group, and 1/16 is to be sorted
            _smallest_of_groups(lanes, smallest)
            limit[i] = np.partition(smallest, rank - 1)[rank - 1]
        else:
            limit[i] = np.partition(estimate, rank - 1)[rank - 1]
        expected[i] = np.sum(bound <= limit[i])


@_reordered
def _squared_distance(row, query):
    total = 0.0
    for c in range(len(query)):
        difference = row[c] - query[c]
        total += difference * difference
    return total


@compiled
def measure_near(product, query, limit, queries, count, index, distance, row, rows, first):
    """Adds the rows (m, C) whose bound is within limit (n,), measured in float64, to index and distance (n, R).

    product, query, row: as in `sample_limits`. queries (n, C) float64; first: the bank's index of row 0. count (n,)
    runs on where R are full. Bounds are looked at in groups, most of which hold nothing near.
    """
    columns, room = product.shape[1], index.shape[1]
    square, step, error, norm = row[0], row[1], row[2], row[3]
    groups = -(-columns // _LANES)
    bound, smallest = np.full(groups * _LANES, np.inf, np.float32), np.empty(groups, np.float32)
    lanes = bound.reshape(_LANES, groups)
    for i in range(len(product)):
        scale, alpha, beta, most, kept, p = query[i, 0], query[i, 1], query[i, 2], limit[i], count[i], product[i]
        for j in range(columns):
            bound[j] = square[j] + scale * step[j] * np.float32(p[j]) - alpha * error[j] - beta * norm[j]
        _smallest_of_groups(lanes, smallest)
        for group in range(groups):
            if smallest[group] <= most:
                for j in range(group, columns, groups):
                    if bound[j] <= most:
                        if kept < room:
                            index[i, kept], distance[i, kept] = first + j, _squared_distance(rows[j], queries[i])
                        kept += 1
        count[i] = kept


@compiled
def _nearest_of(measured, place, distance, index):
    """distance and index (K,) of the K smallest of `measured`, which lie at `place`; equal ones in order of place."""
    far = np.partition(measured, len(distance) - 1)[len(distance) - 1]
    chosen = np.flatnonzero(measured <= far)
    chosen = chosen[np.argsort(place[chosen])]
    order = chosen[np.argsort(measured[chosen], kind="mergesort")[: len(distance)]]
    distance[:], index[:] = measured[order], place[order]


@compiled
def nearest_measured(measured, place, count, distance, index):
    """distance and index (n, K) of the nearest of what `measure_near` found: measured and place (n, R), count (n,).

    Infinity for a query with fewer than K rows, or more than there was room for.
    """
    for i in range(len(count)):
        if distance.shape[1] <= count[i] <= measured.shape[1]:
            _nearest_of(measured[i, : count[i]], place[i, : count[i]], distance[i], index[i])
        else:
            distance[i] = np.inf


@compiled
def nearest_of_all(queries, distance, index, rows):
    """distance and index (n, K) of the nearest of all rows (m, C), each of them measured: slow, whatever the ties."""
    measured, place = np.empty(len(rows)), np.arange(len(rows))
    for i in range(len(queries)):
        for j in range(len(rows)):
            measured[j] = _squared_distance(rows[j], queries[i])
        _nearest_of(measured, place, distance[i], index[i])
