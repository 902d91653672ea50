"""k-NN over ranks: every rank searches its own part of the bank, and only the nearest k of each part are exchanged.

Shapes: N queries in a chunk, K neighbours, W ranks.
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


class Answers(NamedTuple):
    """What k-NN found: accuracies in percent for each k, by either vote."""

    majority: dict[int, float]
    weighted: dict[int, float]
    bank: int  # rows
    queries: int
    search: dict[str, int]  # how many searches (one query in one rank's bank) each method of `nearest` answered


def knn_over_ranks(
    bank: Rows,
    bank_labels: Tensor,
    queries: Rows,
    query_labels: Tensor,
    ks: Sequence[int],
    ranks: Ranks,
    memory: Memory,
    bar: Callable[..., Iterable] = lambda items, *_: items,
) -> Answers:
    """Classifies all ranks' queries by all ranks' bank rows, by both votes and for every k of `ks`.

    bank (m, C) and queries (n, C): this rank's rows; m and n may differ from rank to rank. labels: (m,) and (n,) int64.
    Every chunk of queries visits all ranks; equal distances are in order of rank and row, as on one rank.
    Raises ValueError for a k larger than the bank, and without queries.
    """
    bank_sizes, query_sizes = gather_objects(len(bank), ranks), gather_objects(len(queries), ranks)
    width = max(gather_objects(max(bank.shape[1], queries.shape[1]), ranks))  # a rank without images has width 0
    check_ks(ks, sum(bank_sizes), sum(query_sizes))
    highest = max(gather_objects(int(bank_labels.max()) if len(bank_labels) else 0, ranks))
    chunks = gather_objects(memory.chunks(max(query_sizes), len(bank), width, max(ks)), ranks)
    query_chunk, bank_chunk = min(q for q, _ in chunks), min(b for _, b in chunks)
    centre = bank_mean(bank, ranks.device, bank_chunk) if len(bank) else None
    bank_labels = bank_labels.to(ranks.device)
    majority, weighted, tally = dict.fromkeys(ks, 0), dict.fromkeys(ks, 0), Counter()
    rounds = [(owner, start) for owner, n in enumerate(query_sizes) for start in range(0, n, query_chunk)]
    for owner, start in bar(rounds, len(rounds), "neighbours"):
        num = min(query_chunk, query_sizes[owner] - start)
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
            for hits, is_weighted in ((majority, False), (weighted, True)):
                found = vote_hits(distance, labels, truth, ks, highest + 1, is_weighted)
                hits.update({k: hits[k] + found[k] for k in ks})
    majority, weighted = (percent_of_all(hits, sum(query_sizes), ranks) for hits in (majority, weighted))
    tally = +sum(gather_objects(tally, ranks), Counter())  # + leaves out what is 0
    return Answers(majority, weighted, sum(bank_sizes), sum(query_sizes), dict(tally))


def percent_of_all(hits: dict[int, int], queries: int, ranks: Ranks) -> dict[int, float]:
    """All ranks' hits by k, in percent of all ranks' queries."""
    everyone = gather_objects(hits, ranks)
    return {k: 100 * sum(found[k] for found in everyone) / queries for k in hits}


def check_ks(ks: Sequence[int], bank: int, queries: int) -> None:
    """Raises ValueError when the bank has fewer than k rows, or there are no rows or no queries."""
    for what, images in (("training", bank), ("held-out", queries)):
        if not images:
            raise ValueError(f"k-NN needs at least one {what} image that can be read: check the files of that split")
    if max(ks) > bank:
        raise ValueError(f"there are fewer than -k {max(ks)} training images: choose -k from 1 to {bank}")


def share_chunk(queries: Rows, start: int, num: int, width: int, owner: int, ranks: Ranks) -> Tensor:
    """Rows start to start + num of the queries of rank `owner`, (num, C) float32, broadcast to every rank."""
    if owner == ranks.rank:
        chunk = queries[start : start + num].to(ranks.device, torch.float32).contiguous()
    else:
        chunk = torch.empty(num, width, device=ranks.device)
    if ranks.world_size > 1:
        dist.broadcast(chunk, src=owner)
    return chunk


def merge_nearest(distance: Tensor, labels: Tensor, k: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """The k nearest over all ranks, from each rank's nearest: distances (N, k) float64 ascending, labels (N, k)."""
    if ranks.world_size == 1:
        return distance, labels
    missing = k - distance.shape[1]  # above 0 on a rank with fewer than k rows
    distance = torch.nn.functional.pad(distance, (0, missing), value=torch.inf)
    labels = torch.nn.functional.pad(labels, (0, missing))
    both = [gather_rows(t, ranks).unflatten(0, (ranks.world_size, -1)) for t in (distance, labels)]
    distance, labels = (t.transpose(0, 1).flatten(1) for t in both)  # (N, W k), rank by rank
    distance, order = distance.sort(dim=1, stable=True)
    return distance[:, :k], labels.gather(1, order[:, :k])
