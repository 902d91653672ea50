"""The compiled loops of `nearest_cpu`. None of them holds the GIL, so threads can share the rows.

Arguments with one entry per query (or per row to encode) come first; `compute.share` cuts those among the threads.

Shapes: n queries, m rows of a block, C feature dimensions, K neighbours, R places for the rows kept for a query.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from fastssl.machine.compiled import compiled

_LANES = 16  # columns in a group: most groups hold nothing near and are skipped after one comparison

# sums may be vectorised: always in the same order, but not in that of the source
_reordered = partial(compiled, fastmath={"reassoc", "contract"})


@_reordered
def quantise(rows, codes, scale, norm, error, centre):
    """Writes rows (m, C) - centre (C,) as scale (m,) * codes (m, C) int8; norm and error (m,), of row and rounding."""
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
    """smallest (groups,) = the minimum over the first dimension of lanes (L, groups), in whole vectors."""
    smallest[:] = lanes[0]
    for lane in range(1, len(lanes)):
        for group in range(len(smallest)):
            value = lanes[lane, group]
            smallest[group] = value if value < smallest[group] else smallest[group]


@compiled
def sample_limits(product, query, limit, expected, row, rank):
    """Writes limit (n,), about the rank-th smallest estimated distance, and expected (n,), the number of bounds within.

    product: (n, m), of codes; query (n, 3) and row (4, m): as in `nearest_cpu.Coded`.
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
        if rank <= groups // 4:  # few of the smallest share a group, so a partition of 1/16 of the values is enough
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
    """Measures the rows (m, C) whose bound is within limit (n,), and appends them to index and distance (n, R).

    product, query, row: as in `sample_limits`; queries: (n, C) float64; first: the bank's index of row 0. count (n,)
    is raised by all such rows, also by those that find no place among the R.
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
    """Writes the K smallest of `measured` to distance (K,), their `place` to index (K,); equal ones by place."""
    far = np.partition(measured, len(distance) - 1)[len(distance) - 1]
    chosen = np.flatnonzero(measured <= far)
    chosen = chosen[np.argsort(place[chosen])]
    order = chosen[np.argsort(measured[chosen], kind="mergesort")[: len(distance)]]
    distance[:], index[:] = measured[order], place[order]


@compiled
def nearest_measured(measured, place, count, distance, index):
    """Writes distance and index (n, K) of the nearest among the rows that `measure_near` found.

    measured, place (n, R), count (n,): its distance, index and count. The distance becomes infinite for a query with
    fewer than K such rows, or more than R.
    """
    for i in range(len(count)):
        if distance.shape[1] <= count[i] <= measured.shape[1]:
            _nearest_of(measured[i, : count[i]], place[i, : count[i]], distance[i], index[i])
        else:
            distance[i] = np.inf


@compiled
def nearest_of_all(queries, distance, index, rows):
    """Writes distance and index (n, K) of the nearest among all rows (m, C), each of which is measured."""
    measured, place = np.empty(len(rows)), np.arange(len(rows))
    for i in range(len(queries)):
        for j in range(len(rows)):
            measured[j] = _squared_distance(rows[j], queries[i])
        _nearest_of(measured, place, distance[i], index[i])
