"""The nearest rows of a feature bank, exactly, in bounded memory.

Shapes: N queries, M bank rows, C feature dimensions, K neighbours.

Blocks of bank rows stream past the queries, and only the nearest of each block are kept, so memory holds one block,
whatever M. Float32 matrix products nominate a few more neighbours than are asked for; their distances are then computed
again in float64 from the differences, so neither block sizes nor the device change which rows are nearest. Equal
distances are in order of the bank. On a CPU with numba, the compiled search of `nearest_cpu` finds the same faster.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

from fastssl.eval.compute import full_float32
from fastssl.eval.memory import Rows

try:
    from fastssl.eval.nearest_cpu import find_nearest_cpu
except ImportError:  # numba does not run everywhere
    find_nearest_cpu = None

TORCH = "float32 by torch"  # the name under which `find_nearest_torch` counts its queries
_SPARE = 16  # nominated beyond K, since float32 rounding may swap neighbours at the border
_GROUP = 32  # columns whose minimum `_smallest` looks at first
_MEASURED_AT_ONCE = {"cpu": 1 << 18}  # float64 differences at a time: on a CPU they stay in a core's cache
_FLOAT32_NOISE = 1.2e-7  # relative rounding error of float32
_FLOAT32_LEAST = 1.2e-38  # below it a product loses digits, or is 0
_UNSURE_AT_ONCE = 128  # queries compared in float64, which takes several times the memory of float32


@torch.no_grad()
def find_nearest(
    bank: Rows,
    queries: Tensor,
    k: int,
    bank_chunk: int = 16384,
    centre: Tensor | None = None,
    tally: Counter | None = None,
) -> tuple[Tensor, Tensor]:
    """The k nearest rows of `bank` (M, C) for every row of `queries` (N, C).

    centre: (C,) float64 from `bank_mean`, to be given when a bank is searched more than once. tally: counts the queries
    by the method that nominated their neighbours.
    Returns squared distances (N, k) float64, ascending, and indices (N, k); equal distances are in order of index.
    Raises ValueError when the bank has fewer than k rows.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"the bank does not have k = {k} images: choose k from 1 to {len(bank)}")
    if centre is None:
        centre = bank_mean(bank, queries.device, bank_chunk)
    tally = Counter() if tally is None else tally
    if find_nearest_cpu and queries.device.type == bank.device.type == "cpu":
        return find_nearest_cpu(bank, queries, k, bank_chunk, centre, tally)
    tally[TORCH] += len(queries)
    return find_nearest_torch(bank, queries, k, bank_chunk, centre)


def find_nearest_torch(bank: Rows, queries: Tensor, k: int, bank_chunk: int, centre: Tensor) -> tuple[Tensor, Tensor]:
    """`find_nearest` in PyTorch alone: on a GPU, and on a CPU without numba."""
    q = queries.double() - centre
    nominated, index, largest = _nominate(bank, q.float(), centre, min(k + _SPARE, len(bank)), bank_chunk)
    distance, index = _measure(bank, queries, index)
    if index.shape[1] < len(bank):
        # every row that was not nominated lies at least this far away
        noise = _FLOAT32_NOISE * (8 + math.sqrt(bank.shape[1])) * (q.square().sum(1) + largest)
        beyond = nominated[:, -1] - noise - bank.shape[1] * _FLOAT32_LEAST
        unsure = (~(distance[:, k - 1] < beyond)).nonzero()[:, 0]  # NaN is
        for part in unsure.split(_UNSURE_AT_ONCE) if len(unsure) else ():
            # here many distances are equal, or float32 cannot hold the squares
            nearest = _nominate_by_differences(bank, queries[part].double(), index.shape[1], bank_chunk)
            distance[part], index[part] = _measure(bank, queries[part], nearest)
    return distance[:, :k], index[:, :k]


def _nominate(bank: Rows, q: Tensor, centre: Tensor, num: int, bank_chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `num` nearest by float32 matrix products: distances ascending, their indices, the bank's largest |row|^2."""
    best, best_index = q.new_empty(len(q), 0), torch.empty(len(q), 0, dtype=torch.int64, device=q.device)
    largest = q.new_zeros(())
    with full_float32(q.device):
        for start, b in _blocks(bank, bank_chunk, q.device):
            b = (b - centre).float()
            b_square = b.square().sum(1)
            largest = torch.maximum(largest, b_square.max())
            distance = torch.addmm(b_square, q, b.T, alpha=-2)  # (N, bank_chunk), without |q|^2, the same for all rows
            values, index = _smallest(distance, min(num, len(b)))
            best, best_index = torch.cat([best, values], 1), torch.cat([best_index, index + start], 1)
            best, order = best.topk(min(num, best.shape[1]), largest=False)
            best_index = best_index.gather(1, order)
    return best + q.square().sum(1, keepdim=True), best_index, largest


def _smallest(distance: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Values and columns of the `num` smallest of each row, like topk, which here has fewer columns to look at.

    The `num` groups of columns with the smallest minima hold them all: a value in any other group is at least that
    group's minimum, and `num` groups have one that is no larger.
    """
    groups = distance.shape[1] // _GROUP
    if groups <= 2 * num:
        return distance.topk(num, largest=False)
    whole = groups * _GROUP
    minima = distance[:, :whole].view(-1, _GROUP, groups).amin(1)  # column c is in group c % groups
    chosen = minima.topk(num, largest=False).indices
    columns = (chosen[:, :, None] + groups * torch.arange(_GROUP, device=chosen.device)).flatten(1)
    rest = torch.arange(whole, distance.shape[1], device=chosen.device).expand(len(distance), -1)
    columns = torch.cat([columns, rest], 1)
    values, order = distance.gather(1, columns).topk(num, largest=False)
    return values, columns.gather(1, order)


def _nominate_by_differences(bank: Rows, queries: Tensor, num: int, bank_chunk: int) -> Tensor:
    """Indices (N, num) of the nearest by float64 differences, equal ones in order of index.

    Slower than products, but sure: neither equal distances nor rows far away from all others change it.
    """
    best, best_index = queries.new_empty(len(queries), 0), torch.empty_like(queries[:, :0], dtype=torch.int64)
    for start, b in _blocks(bank, bank_chunk, queries.device):
        distance = torch.cdist(queries, b, compute_mode="donot_use_mm_for_euclid_dist")
        index = torch.arange(start, start + len(b), device=queries.device).expand(len(queries), -1)
        best, order = torch.cat([best, distance], 1).sort(dim=1, stable=True)
        best_index = torch.cat([best_index, index], 1).gather(1, order)[:, :num]
        best = best[:, :num]
    return best_index


def _measure(bank: Rows, queries: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Float64 squared distances of each query to its rows `index` (N, k), ascending, and `index` in that order."""
    index = index.sort(dim=1).values  # so that the stable sort below keeps equal distances in order of index
    at_once = max(1, _MEASURED_AT_ONCE.get(queries.device.type, 1 << 24) // (index.shape[1] * queries.shape[1]))

    def measure(q: Tensor, i: Tensor) -> Tensor:
        rows = bank[i.to(bank.device)].to(q.device).double()  # (n, k, C)
        return (rows - q.double()[:, None]).square_().sum(-1)

    distances = [measure(q, i) for q, i in zip(queries.split(at_once), index.split(at_once))]
    distance, order = torch.cat(distances).sort(dim=1, stable=True)
    return distance, index.gather(1, order)


def bank_mean(bank: Rows, device: torch.device, bank_chunk: int = 16384) -> Tensor:
    """The mean row, (C,) float64 on `device`. Distances are computed around it, which loses fewer digits."""
    starts = range(0, len(bank), bank_chunk)
    return sum(bank[i : i + bank_chunk].to(device).sum(0, dtype=torch.float64) for i in starts) / len(bank)


def _blocks(bank: Rows, bank_chunk: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """Yields (index of the first row, rows in float64 on `device`) for consecutive blocks of the bank."""
    for start in range(0, len(bank), bank_chunk):
        yield start, bank[start : start + bank_chunk].to(device).double()
