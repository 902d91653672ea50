"""Exact k-nearest-neighbour classification by Euclidean distance, for all k from one pass over the bank.

Shapes: N queries, M bank rows, C feature dimensions, K neighbours.

Blocks of bank rows stream past blocks of queries, and of each block's distances only the nearest survive: memory is
one block, whatever N and M. Matrix products in float32 nominate a few neighbours too many; their distances are then
computed again in float64 from the differences, so neither block sizes nor the device change who is nearest. Equal
distances go to the smaller bank index, equal votes to the smaller label.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

REP_SPACES = ("original", "norm", "shift-norm")
_SPARE = 16  # nominated beyond K: float32 noise may swap neighbours at the border
_MEASURED_AT_ONCE = 1 << 22  # float64 differences
_FLOAT32_NOISE = 1.2e-7


def odd_ks(largest: int) -> list[int]:
    """1, 3, 5, ... up to `largest`."""
    return list(range(1, largest + 1, 2))


def to_rep_space(features: Tensor, rep_space: str, batch_size: int | None = None) -> Tensor:
    """(n, C) features as they are compared: original; norm: unit rows; shift-norm: less the mean, then unit rows.

    The mean of shift-norm is that of each `batch_size` consecutive rows, as the small-model project takes it, or of
    all rows. Raises ValueError for another name.
    """
    if rep_space == "original":
        return features
    if rep_space == "norm":
        return normalize(features, dim=1)
    if rep_space in ("shift-norm", "shifted-norm"):
        parts = features.split(batch_size or max(1, len(features)))
        return torch.cat([normalize(part - part.mean(dim=0), dim=1) for part in parts])
    raise ValueError(f"unknown representation space {rep_space!r}: choose {', '.join(REP_SPACES)}")


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    ks: Sequence[int],
    *,
    weighted: bool = False,
    temperature: float = 0.07,
    query_chunk: int = 1024,
    bank_chunk: int = 8192,
) -> dict[int, float]:
    """Accuracy in percent for each k of `ks`; arguments as `knn_hits`. Raises ValueError without queries."""
    if len(queries) == 0:
        raise ValueError("k-NN needs at least one query image")
    hits = knn_hits(
        bank, bank_labels, queries, query_labels, ks,
        weighted=weighted, temperature=temperature, query_chunk=query_chunk, bank_chunk=bank_chunk,
    )  # fmt: skip
    return {k: 100 * hit / len(queries) for k, hit in hits.items()}


def knn_hits(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    ks: Sequence[int],
    *,
    weighted: bool = False,
    temperature: float = 0.07,
    query_chunk: int = 1024,
    bank_chunk: int = 8192,
) -> dict[int, int]:
    """How many queries each k of `ks` classifies correctly.

    bank: (M, C) and queries: (N, C), floating point; labels: (M,) and (N,) int64, none negative in the bank. The bank
    may lie on another device (or be mapped from disk): it is moved block by block to the queries'. weighted: a
    neighbour at distance d votes with exp(-d^2 / (2 temperature)), on unit rows the exp(cosine / temperature) of Wu
    et al. (arXiv 1805.01978); otherwise with 1.
    Raises ValueError for a k outside 1..M, shapes that do not match, non-finite features or unlabelled bank rows.
    """
    _check(bank, bank_labels, queries, query_labels, ks)
    num_classes = int(bank_labels.max()) + 1
    bank_labels, query_labels = bank_labels.to(queries.device), query_labels.to(queries.device)
    hits = dict.fromkeys(ks, 0)
    for start in range(0, len(queries), query_chunk):
        part = slice(start, start + query_chunk)
        distance, index = find_nearest(bank, queries[part], max(ks), bank_chunk)
        weight = torch.exp((distance[:, :1] - distance) / (2 * temperature)) if weighted else torch.ones_like(distance)
        for k, prediction in vote(bank_labels[index], weight, ks, num_classes):
            hits[k] += int((prediction == query_labels[part]).sum())
    return hits


def vote(labels: Tensor, weights: Tensor, ks: Iterable[int], num_classes: int) -> Iterator[tuple[int, Tensor]]:
    """(k, (N,) int64 winning labels) for each k of `ks`, ascending; ties go to the smallest label.

    labels: (N, K) int64 of the neighbours, nearest first; weights: (N, K), positive. A neighbour changes one count,
    so the winner is the one before it or its label.
    """
    counts = weights.new_zeros(labels.shape[0], num_classes)
    best, winner = weights.new_zeros(labels.shape[0]), labels[:, 0].clone()
    wanted = set(ks)
    for k in range(1, max(wanted) + 1):
        label = labels[:, k - 1]
        counts.scatter_add_(1, label[:, None], weights[:, k - 1 : k])
        count = counts.gather(1, label[:, None])[:, 0]
        takes = (count > best) | ((count == best) & (label < winner))
        best, winner = torch.maximum(best, count), torch.where(takes, label, winner)
        if k in wanted:
            yield k, winner


@torch.no_grad()
def find_nearest(bank: Tensor, queries: Tensor, k: int, bank_chunk: int = 8192) -> tuple[Tensor, Tensor]:
    """The k nearest rows of `bank` (M, C) for every row of `queries` (N, C).

    Returns squared distances (N, k) float64, ascending, and indices (N, k); equal distances are in order of index.
    Raises ValueError when the bank has fewer than k rows.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k = {k} neighbours from a bank of {len(bank)} images: choose k from 1 to {len(bank)}")
    centre = _mean(bank, bank_chunk, queries.device)  # distances around the origin lose fewer digits
    q = queries.double() - centre
    nominated, index, largest = _nominate(bank, q.float(), centre, min(k + _SPARE, len(bank)), bank_chunk)
    distance, index = _measure(bank, queries, index)
    if index.shape[1] < len(bank):
        # a row that was not nominated lies at least this far away
        beyond = nominated[:, -1] - _FLOAT32_NOISE * (8 + math.sqrt(bank.shape[1])) * (q.square().sum(1) + largest)
        unsure = distance[:, k - 1] >= beyond
        if bool(unsure.any()):  # many equal distances
            nearest = _nominate_double(bank, q[unsure], centre, index.shape[1], bank_chunk)
            distance[unsure], index[unsure] = _measure(bank, queries[unsure], nearest)
    return distance[:, :k], index[:, :k]


def _nominate(bank: Tensor, q: Tensor, centre: Tensor, num: int, bank_chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `num` nearest by float32 matrix products: distances ascending, indices, and the bank's largest |row|^2."""
    q_square = q.square().sum(1, keepdim=True)
    best, best_index = q.new_empty(len(q), 0), torch.empty(len(q), 0, dtype=torch.int64, device=q.device)
    largest = q.new_zeros(())
    with _full_float32(q.device):
        for start, b in _blocks(bank, bank_chunk, q.device):
            b = (b - centre).float()
            b_square = b.square().sum(1)
            largest = torch.maximum(largest, b_square.max())
            distance = torch.addmm(b_square, q, b.T, alpha=-2).add_(q_square)  # (N, bank_chunk)
            values, index = distance.topk(min(num, len(b)), largest=False)
            best, best_index = torch.cat([best, values], 1), torch.cat([best_index, index + start], 1)
            best, order = best.topk(min(num, best.shape[1]), largest=False)
            best_index = best_index.gather(1, order)
    return best, best_index, largest


def _nominate_double(bank: Tensor, q: Tensor, centre: Tensor, num: int, bank_chunk: int) -> Tensor:
    """Indices (N, num) of the nearest in float64; those equal to float32 precision by index. Slower, any ties."""
    best = torch.empty(len(q), 0, dtype=torch.int64, device=q.device)
    for start, b in _blocks(bank, bank_chunk, q.device):
        b = b - centre
        distance = torch.addmm(b.square().sum(1), q, b.T, alpha=-2).add_(q.square().sum(1, keepdim=True))
        # the bits of a non-negative float sort as an integer, so one key holds the distance and the index
        bits = distance.clamp_(min=0).float().view(torch.int32).long()
        key = (bits << 32) | torch.arange(start, start + len(b), device=q.device)
        best = torch.cat([best, key.topk(min(num, len(b)), largest=False).values], 1)
        best = best.topk(min(num, best.shape[1]), largest=False).values
    return best & 0xFFFFFFFF


def _measure(bank: Tensor, queries: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Float64 squared distances of each query to its rows `index` (N, k), and `index`, both sorted by them."""
    index = index.sort(dim=1).values
    rows = max(1, _MEASURED_AT_ONCE // (index.shape[1] * queries.shape[1]))
    distance = torch.cat(
        [
            (bank[i.to(bank.device)].to(q.device).double() - q.double()[:, None]).square_().sum(-1)
            for q, i in zip(queries.split(rows), index.split(rows))
        ]
    )
    distance, order = distance.sort(dim=1, stable=True)
    return distance, index.gather(1, order)


def _mean(bank: Tensor, bank_chunk: int, device: torch.device) -> Tensor:
    return sum(b.sum(0) for _, b in _blocks(bank, bank_chunk, device)) / len(bank)


def _blocks(bank: Tensor, bank_chunk: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows in float64 on `device`) of consecutive blocks of the bank."""
    for start in range(0, len(bank), bank_chunk):
        yield start, bank[start : start + bank_chunk].to(device).double()


@contextlib.contextmanager
def _full_float32(device: torch.device) -> Iterator[None]:
    """No TF32 and no autocast."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _check(bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, ks: Sequence[int]) -> None:
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1]:
        raise ValueError(f"bank (M, C) and queries (N, C) must agree, got {tuple(bank.shape)}, {tuple(queries.shape)}")
    for name, features, labels in (("bank", bank, bank_labels), ("queries", queries, query_labels)):
        if labels.shape != features.shape[:1]:
            raise ValueError(f"{len(features)} features but labels of shape {tuple(labels.shape)} in the {name}")
        if not bool(torch.isfinite(features).all()):
            raise ValueError(f"the features of the {name} are not all finite: the encoder is broken")
    if not ks or min(ks) < 1 or max(ks) > len(bank):
        raise ValueError(f"k must lie between 1 and {len(bank)}, the images in the bank; got {list(ks)}")
    if bool((bank_labels < 0).any()):
        raise ValueError("k-NN needs a class for every image in the bank: give <class>/ folders")
