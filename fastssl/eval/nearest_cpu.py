"""The nearest rows of a feature bank on a CPU: products of int8 nominate, float64 decides.

Rows are rounded to int8, each with its own scale; what rounding leaves out is known, so by Cauchy-Schwarz every
product of codes gives a lower bound of the distance. A sample of the bank says how far the neighbours of a query may
lie, and rows whose bound is within that are measured in float64. A query whose k-th neighbour turns out to lie beyond
it, or that has more such rows than there is room for, is measured against the whole bank: nothing is left to chance.

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
from fastssl.threads import run_in_threads

_SAMPLE = 2048  # bank rows, evenly spread
_QUERIES, _ROWS = 512, 1024  # of each thread, whose products are looked at while its cache holds them
_MEASURED_BYTES = 64 * 2**20  # distances and indices of the rows that are measured
_MANY = 1 / 16  # of the bank: where int8 cannot tell so many apart, float32 takes its place
_WIDEST = 100_000  # features whose products int32 holds
_ROUNDING = 1e-6  # of the float32 sums in `measure_near`: several times 2^-24


class Coded(NamedTuple):
    """m rows as they are multiplied, and what turns a product into a lower bound of |b|^2 - 2 q.b."""

    rows: Tensor  # (m, C) int8 codes, or float32
    query: np.ndarray  # (m, 3) float32: -2 scale, and what a row's error and norm count; for rows that ask
    row: np.ndarray  # (4, m) float32: squared norm, scale, error, norm; for rows that are asked
    square: np.ndarray  # (m,) float64 squared norm


@full_float32(torch.device("cpu"))  # here, not around each product: it is the whole process's setting
def find_nearest_cpu(
    bank: Rows, queries: Tensor, k: int, bank_chunk: int, centre: Tensor, tally: Counter
) -> tuple[Tensor, Tensor]:
    """As `nearest.find_nearest`; tally counts queries by what nominated their neighbours.

    "int8", "float32", or "every row measured" where neither could.
    """
    exact, centre = queries.double().contiguous().numpy(), centre.numpy()
    for in_int8 in (True, False) if int8_is_exact() and exact.shape[1] < _WIDEST else (False,):
        coded = encode(exact, centre, in_int8)
        limit, expected = sample_bank(bank, coded, centre, k)
        if expected.mean() <= max(4096, _MANY * len(bank)):
            break
    limit[~in_range(coded.square)] = -np.inf
    room = min(len(bank), int(1.5 * np.quantile(expected, 0.99)) + 4 * k + 256)
    distance, index = np.empty((len(exact), k)), np.empty((len(exact), k), np.int64)
    for part in slices(len(exact), max(1, _MEASURED_BYTES // (12 * room))):
        some = Coded(coded.rows[part], coded.query[part], coded.row, coded.square)
        found = measure_near_rows(bank, some, exact[part], limit[part], room, min(bank_chunk, _ROWS), centre)
        share(nearest_measured, *found, distance[part], index[part], rest=())
    far = distance[:, -1]
    unsure = np.flatnonzero((far > limit + coded.square) | (far == np.inf))
    if len(unsure):
        distance[unsure], index[unsure] = measure_every_row(bank, exact[unsure], k, bank_chunk)
    tally.update({"int8" if in_int8 else "float32": len(exact) - len(unsure), "every row measured": len(unsure)})
    return torch.from_numpy(distance), torch.from_numpy(index)


def encode(rows: np.ndarray, centre: np.ndarray, in_int8: bool) -> Coded:
    """rows (m, C) less centre (C,) as they are multiplied."""
    m, width = rows.shape
    scale, norm, error = np.ones(m), np.empty(m), np.empty(m)
    if in_int8:
        codes = np.empty((m, width), np.int8)
        share(quantise, rows, codes, scale, norm, error, rest=(centre,))
    else:
        centred = rows - centre
        codes, norm = centred.astype(np.float32), np.sqrt(np.square(centred).sum(1))
        error = norm * (2 + width / 2) * 2.0**-24  # of rounding, and half of what adding C products can lose
    odd = ~in_range(np.square(norm))
    reach = 2 * (norm + error)
    query = np.stack([-2 * scale, reach * (1 + _ROUNDING), 2 * error + reach * _ROUNDING], axis=1)
    row = np.stack([norm**2 * (1 - _ROUNDING), scale, error, norm])
    query[odd], row[:, odd] = 0, 0
    row[0, odd] = -np.inf  # no bound: always measured
    return Coded(torch.from_numpy(codes), query.astype(np.float32), row.astype(np.float32), np.square(norm))


def in_range(square: np.ndarray) -> np.ndarray:
    """Whether float32 can hold what bounds are made of."""
    return (square == 0) | ((square > 1e-30) & (square < 1e30))


def multiply(queries: Tensor, rows: Tensor, space: Tensor) -> np.ndarray:
    """(n, m) products of codes (n, C) and (m, C), int32, exact, or float32; they lie in `space`, int32 of any size.

    The same space again and again: memory fresh from the system costs more than the products.
    """
    product = space[: len(queries) * len(rows)].view(len(queries), len(rows))
    if rows.dtype == torch.int8:
        return torch._int_mm(queries, rows.T, out=product).numpy()
    return torch.mm(queries, rows.T, out=product.view(torch.float32)).numpy()


def sample_bank(bank: Rows, queries: Coded, centre: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """How far k neighbours may lie, (N,) less |q|^2, and how many rows' bounds are expected within that, (N,).

    In a sample of the bank it is the rank that k has on average and four deviations more, so few queries fall short.
    """
    size = min(_SAMPLE, len(bank))
    mean = k * size / len(bank)
    rank = math.ceil(mean + 4 * math.sqrt(mean) + 4)
    limit, within = np.full(len(queries.square), np.inf, np.float32), np.full(len(queries.square), size, np.int64)
    if size == len(bank) or rank > size:
        return limit, within * (len(bank) / size)
    sample = bank[torch.arange(size) * len(bank) // size]
    rows = encode(as_rows(sample), centre, queries.rows.dtype == torch.int8)
    at_once = queries_at_once(len(limit))
    space = torch.empty(at_once * size, dtype=torch.int32)
    for part in slices(len(limit), at_once):
        product = multiply(queries.rows[part], rows.rows, space)
        share(sample_limits, product, queries.query[part], limit[part], within[part], rest=(rows.row, rank))
    return limit, within * (len(bank) / size)


def measure_near_rows(
    bank: Rows, queries: Coded, exact: np.ndarray, limit: np.ndarray, room: int, bank_chunk: int, centre: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The bank's rows whose bounds are within limit (N,): distances (N, room), indices (N, room), and how many (N,).

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
        product = multiply(queries.rows[part], rows.rows, space)
        asked = (queries.query[part], limit[part], exact[part])
        found = (count[part], index[part], distance[part])
        measure_near(product, *asked, *found, rows.row, block, start)
        spaces.put(space)

    for start in range(0, len(bank), bank_chunk):
        block = as_rows(bank[start : start + bank_chunk])
        rows = encode(block, centre, queries.rows.dtype == torch.int8)
        run_in_threads(partial(measure, start, block, rows), parts)
    return distance, index, count


def measure_every_row(bank: Rows, queries: np.ndarray, k: int, bank_chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances and indices (N, k) of the nearest, each row of the bank measured: slow, whatever the ties."""
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
    """(m, C) as the compiled loops read them: float32, or float64 where they are."""
    return (rows if rows.dtype in (torch.float32, torch.float64) else rows.float()).detach().contiguous().numpy()


def queries_at_once(num: int) -> int:
    """How many of `num` queries are multiplied at once."""
    return min(num, _QUERIES * torch.get_num_threads())


@cache
def int8_is_exact() -> bool:
    """Whether this CPU multiplies int8 with instructions for it, and without saturating on the way."""
    if not getattr(torch.cpu, "_is_vnni_supported", bool)():
        return False
    extreme = torch.full((64, 512), 127, dtype=torch.int8)
    return bool((torch._int_mm(extreme, extreme.T) == 512 * 127**2).all())
