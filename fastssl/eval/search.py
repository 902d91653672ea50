"""k-NN over ranks: every rank holds a part of the bank, and only the nearest k of each part travel.

Shapes: N queries of a chunk, K neighbours, W ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastssl.distributed import Ranks, gather_objects, gather_rows
from fastssl.eval.memory import Memory, Rows
from fastssl.eval.nearest import bank_mean, find_nearest
from fastssl.eval.vote import vote_hits

TEMPERATURE = 0.07  # of the weighted vote (Wu et al., arXiv 1805.01978)
Bar = Callable[..., Iterable]


class Answers(NamedTuple):
    """Accuracy in percent for each k, and how much was asked of how much."""

    majority: dict[int, float]
    weighted: dict[int, float]
    bank: int
    queries: int
    search: dict[str, int]  # searches of one query in one rank's bank, by what nominated the neighbours


def knn_over_ranks(
    bank: Rows,
    bank_labels: Tensor,
    queries: Rows,
    query_labels: Tensor,
    ks: Sequence[int],
    ranks: Ranks,
    memory: Memory,
    bar: Bar = lambda items, *_: items,
) -> Answers:
    """Both votes for every k of `ks`, of all ranks' queries among all ranks' bank rows.

    bank (m, C) and queries (n, C): this rank's rows, which may differ in number; labels (m,) and (n,) int64. Every
    chunk of queries visits all ranks; equal distances are in order of rank and row, as on one rank.
    Raises ValueError for a k larger than the bank, and without queries.
    """
    sizes = gather_objects((len(bank), len(queries), bank.shape[1], queries.shape[1]), ranks)
    total, asked, width = sum(m for m, _, _, _ in sizes), sum(n for _, n, _, _ in sizes), max(max(s[2:]) for s in sizes)
    check_ks(ks, total, asked)
    highest = max(gather_objects(int(bank_labels.max()) if len(bank_labels) else 0, ranks))
    chunks = gather_objects(memory.chunks(max(n for _, n, _, _ in sizes), len(bank), width, max(ks)), ranks)
    query_chunk, bank_chunk = min(q for q, _ in chunks), min(b for _, b in chunks)
    centre = bank_mean(bank, ranks.device, bank_chunk) if len(bank) else None
    bank_labels = bank_labels.to(ranks.device)
    hits, tally = [dict.fromkeys(ks, 0), dict.fromkeys(ks, 0)], Counter()
    rounds = [(o, start) for o, (_, n, _, _) in enumerate(sizes) for start in range(0, n, query_chunk)]
    for owner, start in bar(rounds, len(rounds), "neighbours"):
        num = min(query_chunk, sizes[owner][1] - start)
        chunk = share_chunk(queries, start, num, width, owner, ranks)
        k = min(max(ks), len(bank))
        if k:
            distance, index = find_nearest(bank, chunk, k, bank_chunk, centre, tally)
            labels = bank_labels[index]
        else:
            distance, labels = chunk.new_empty(num, 0, dtype=torch.float64), bank_labels.new_empty(num, 0)
        distance, labels = merge_nearest(distance, labels, max(ks), ranks)
        if owner == ranks.rank:
            truth = query_labels[start : start + num].to(ranks.device)
            for found, weighted in zip(hits, (False, True)):
                more = vote_hits(distance, labels, truth, ks, highest + 1, weighted, TEMPERATURE)
                found.update({k: found[k] + more[k] for k in ks})
    everyone = gather_objects((*hits, tally), ranks)
    majority, weighted = ({k: 100 * sum(h[i][k] for h in everyone) / asked for k in ks} for i in (0, 1))
    return Answers(majority, weighted, total, asked, dict(+sum((h[2] for h in everyone), Counter())))


def check_ks(ks: Sequence[int], bank: int, queries: int) -> None:
    """Raises ValueError when k neighbours cannot be found, or nobody asks."""
    if not queries:
        raise ValueError("no image of the held-out split can be read: k-NN needs at least one to ask about")
    if max(ks) > bank:
        raise ValueError(f"-k {max(ks)} neighbours from {bank} training images: choose -k from 1 to {bank}")


def share_chunk(queries: Rows, start: int, num: int, width: int, owner: int, ranks: Ranks) -> Tensor:
    """Rows start to start + num of the owner's queries, (num, C) float32 on every rank's device."""
    if owner == ranks.rank:
        chunk = queries[start : start + num].to(ranks.device, torch.float32).contiguous()
    else:
        chunk = torch.empty(num, width, device=ranks.device)
    if ranks.world_size > 1:
        dist.broadcast(chunk, src=owner)
    return chunk


def merge_nearest(distance: Tensor, labels: Tensor, k: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """The k nearest over all ranks from each rank's nearest: distances (N, k) float64 ascending, labels (N, k)."""
    if ranks.world_size == 1:
        return distance, labels
    missing = k - distance.shape[1]  # a rank with fewer rows than k
    distance = torch.nn.functional.pad(distance, (0, missing), value=torch.inf)
    labels = torch.nn.functional.pad(labels, (0, missing))
    both = [gather_rows(t, ranks).unflatten(0, (ranks.world_size, -1)) for t in (distance, labels)]
    distance, labels = (t.transpose(0, 1).flatten(1) for t in both)  # (N, W k), rank by rank
    distance, order = distance.sort(dim=1, stable=True)
    return distance[:, :k], labels.gather(1, order[:, :k])
