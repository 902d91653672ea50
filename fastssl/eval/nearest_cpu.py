"""The nearest rows of a feature bank on a CPU: int8 products nominate rows, float64 distances decide.

Rows are rounded to int8, each with its own scale. The rounding errors are known, so by Cauchy-Schwarz every product of
codes gives a lower bound of the distance. A sample of the bank tells about how far away the neighbours of a query lie:
its limit. Rows whose lower bound is within the limit are measured in float64. A query whose k-th neighbour turns out to
lie beyond its limit, or for which too many rows qualify, is measured against the whole bank, so the result is exact.

Shapes: N queries, M bank rows, C feature dimensions, K neighbours.
"""

from __future__ import annotations

import math
from collections import Counter
from functools import cache, partial
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastssl.eval.compute import full_float32, share, slices
from fastssl.eval.memory import Rows
from fastssl.eval.nearest_loops import measure_near, nearest_measured, nearest_of_all, quantise, sample_limits
from fastssl.machine.threads import run_in_threads

_SAMPLE = 2048  # bank rows in the sample, evenly spread
_QUERIES, _ROWS = 512, 1024  # a thread's block of products, which stays in its cache until it has been looked at
_MEASURED_BYTES = 64 * 2**20  # for the distances and indices of the rows that are measured
_MANY = 1 / 16  # share of the bank: if more rows than that are within the limit by int8, float32 takes its place
_WIDEST = 100_000  # feature dimensions: int32 holds the sum of so many products of codes
_ROUNDING = 1e-6  # relative error of the float32 sums in `measure_near`: several times 2^-24


class Coded(NamedTuple):
    """m rows as they are multiplied, and the factors that turn a product into a lower bound of |b|^2 - 2 q.b."""

    rows: Tensor  # (m, C) int8 codes, or float32
    query: np.ndarray  # (m, 3) float32, as queries: -2 scale, and the factors of a bank row's error and norm
    row: np.ndarray  # (4, m) float32, as bank rows: squared norm, scale, error, norm
    square: np.ndarray  # (m,) float64 squared norm


@full_float32(torch.device("cpu"))  # here, not around each product: it is the whole process's setting
def find_nearest_cpu(
    bank: Rows, queries: Tensor, k: int, bank_chunk: int, centre: Tensor, tally: Counter
) -> tuple[Tensor, Tensor]:
    """As `nearest.find_nearest`. tally counts the queries under "int8", "float32" or "every row measured"."""
    exact, centre = queries.double().contiguous().numpy(), centre.numpy()
    in_int8 = int8_is_exact() and exact.shape[1] < _WIDEST
    coded = encode(exact, centre, in_int8)
    limit, expected = sample_bank(bank, coded, centre, k)
    if in_int8 and expected.mean() > max(4096, _MANY * len(bank)):
        in_int8 = False
        coded = encode(exact, centre, in_int8)
        limit, expected = sample_bank(bank, coded, centre, k)
    limit[~in_range(coded.square)] = -np.inf
    room = min(len(bank), int(1.5 * np.quantile(expected, 0.99)) + 4 * k + 256)
    distance, index = np.empty((len(exact), k)), np.empty((len(exact), k), np.int64)
    for part in slices(len(exact), max(1, _MEASURED_BYTES // (12 * room))):
        some = Coded(coded.rows[part], coded.query[part], coded.row, coded.square)
        found = measure_near_rows(bank, some, exact[part], limit[part], room, min(bank_chunk, _ROWS), centre)
        share(nearest_measured, *found, distance[part], index[part], rest=())
    farthest = distance[:, -1]
    unsure = np.flatnonzero((farthest > limit + coded.square) | (farthest == np.inf))
    if len(unsure):
        distance[unsure], index[unsure] = measure_every_row(bank, exact[unsure], k, bank_chunk)
    tally.update({"int8" if in_int8 else "float32": len(exact) - len(unsure), "every row measured": len(unsure)})
    return torch.from_numpy(distance), torch.from_numpy(index)


def encode(rows: np.ndarray, centre: np.ndarray, in_int8: bool) -> Coded:
    """rows (m, C) minus centre (C,), as int8 codes or float32."""
    m, width = rows.shape
    scale, norm, error = np.ones(m), np.empty(m), np.empty(m)
    if in_int8:
        codes = np.empty((m, width), np.int8)
        share(quantise, rows, codes, scale, norm, error, rest=(centre,))
    else:
        centred = rows - centre
        codes, norm = centred.astype(np.float32), np.sqrt(np.square(centred).sum(1))
        error = norm * (2 + width / 2) * 2.0**-24  # of rounding, and half of what summing C products can lose
    extreme = ~in_range(np.square(norm))
    reach = 2 * (norm + error)
    query = np.stack([-2 * scale, reach * (1 + _ROUNDING), 2 * error + reach * _ROUNDING], axis=1)
    row = np.stack([norm**2 * (1 - _ROUNDING), scale, error, norm])
    query[extreme], row[:, extreme] = 0, 0
    row[0, extreme] = -np.inf  # no lower bound, so these rows are always measured
    return Coded(torch.from_numpy(codes), query.astype(np.float32), row.astype(np.float32), np.square(norm))


def in_range(square: np.ndarray) -> np.ndarray:
    """Whether float32 can hold the terms of a bound, given the squared norms."""
    return (square == 0) | ((square > 1e-30) & (square < 1e30))


def multiply(queries: Tensor, rows: Tensor, space: Tensor) -> np.ndarray:
    """Products (n, m) of codes (n, C) and (m, C): exact in int32, or float32.

    They are written to the front of `space` (int32), which is used again and again: memory fresh from the system costs
    more than the products.
    """
    product = space[: len(queries) * len(rows)].view(len(queries), len(rows))
    if rows.dtype == torch.int8:
        return torch._int_mm(queries, rows.T, out=product).numpy()
    return torch.mm(queries, rows.T, out=product.view(torch.float32)).numpy()


def sample_bank(bank: Rows, queries: Coded, centre: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Each query's limit, and how many bank rows are expected to have a bound within it: both (N,).

    The limit is the distance of the k nearest, minus |q|^2, as estimated from a sample of the bank: the rank that the
    k-th has there on average, plus four standard deviations, so that few queries fall short.
    """
    size = min(_SAMPLE, len(bank))
    mean = k * size / len(bank)
    rank = math.ceil(mean + 4 * math.sqrt(mean) + 4)
    limit, within = np.full(len(queries.square), np.inf, np.float32), np.full(len(queries.square), size, np.int64)
    if size == len(bank) or rank > size:
        return limit, within * (len(bank) / size)
    sample = bank[torch.arange(size) * len(bank) // size]
    rows = encode(as_rows(sample), centre, queries.rows.dtype == torch.int8)
    at_once = min(len(limit), _QUERIES * torch.get_num_threads())
    space = torch.empty(at_once * size, dtype=torch.int32)
    for part in slices(len(limit), at_once):
        product = multiply(queries.rows[part], rows.rows, space)
        share(sample_limits, product, queries.query[part], limit[part], within[part], rest=(rows.row, rank))
    return limit, within * (len(bank) / size)


def measure_near_rows(
    bank: Rows, queries: Coded, exact: np.ndarray, limit: np.ndarray, room: int, bank_chunk: int, centre: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distances (N, room) and indices (N, room) of the bank rows whose bounds are within limit (N,); their number (N,).

    They are measured while the cache holds them: later each of them would have to come from memory. Each thread
    multiplies and measures for its own queries: sharing a product they would wait for each other at its end.
    """
    threads = torch.get_num_threads()
    rounds = -(-len(limit) // (_QUERIES * threads))
    parts = list(slices(len(limit), -(-len(limit) // (rounds * threads))))  # as many for each thread
    spaces = SimpleQueue()  # one for each thread
    for _ in range(threads):
        spaces.put(torch.empty(_QUERIES * bank_chunk, dtype=torch.int32))
    distance, index = np.empty((len(limit), room)), np.empty((len(limit), room), np.int32)
    count = np.zeros(len(limit), np.int64)

    def measure(start: int, block: np.ndarray, rows: Coded, part: slice) -> None:
        space = spaces.get()
        try:
            product = multiply(queries.rows[part], rows.rows, space)
            asked = (queries.query[part], limit[part], exact[part])
            found = (count[part], index[part], distance[part])
            measure_near(product, *asked, *found, rows.row, block, start)
        finally:
            spaces.put(space)  # after an error, too: other parts would wait for it for ever

    for start in range(0, len(bank), bank_chunk):
        block = as_rows(bank[start : start + bank_chunk])
        rows = encode(block, centre, queries.rows.dtype == torch.int8)
        run_in_threads(partial(measure, start, block, rows), parts)
    return distance, index, count


def measure_every_row(bank: Rows, queries: np.ndarray, k: int, bank_chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances and indices (N, k) of the nearest, with every row of the bank measured: slow, but always sure."""
    distance, index = np.empty((len(queries), 0)), np.empty((len(queries), 0), np.int64)
    for start in range(0, len(bank), bank_chunk):
        rows = as_rows(bank[start : start + bank_chunk])
        found = np.empty((len(queries), min(k, len(rows)))), np.empty((len(queries), min(k, len(rows))), np.int64)
        share(nearest_of_all, queries, *found, rest=(rows,))
        distance, index = np.hstack([distance, found[0]]), np.hstack([index, found[1] + start])
        order = np.argsort(distance, axis=1, kind="stable")[:, :k]
        distance, index = (np.take_along_axis(array, order, 1) for array in (distance, index))
    return distance, index


def as_rows(rows: Tensor) -> np.ndarray:
    """Rows (m, C) as the compiled loops read them: float64 stays, everything else becomes float32."""
    if rows.dtype not in (torch.float32, torch.float64):
        rows = rows.float()
    return rows.detach().contiguous().numpy()


@cache
def int8_is_exact() -> bool:
    """Whether this CPU has instructions for int8 products, and adds them up without saturating."""
    if not getattr(torch.cpu, "_is_vnni_supported", bool)():
        return False
    extreme = torch.full((64, 512), 127, dtype=torch.int8)
    return bool((torch._int_mm(extreme, extreme.T) == 512 * 127**2).all())
