"""The peers of k-NN: the small-model project's way, written from its description, and only the search within it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def knn_the_reference_way(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, ks: Sequence[int], batch_size: int
) -> dict[int, float]:
    """Accuracy in percent for each k, by the steps of ssl-small's k-NN script on one device.

    For each batch of training rows: `torch.cdist`, `topk` together with the k best so far, and a Python loop over the
    queries that picks the labels. Then, for each k: `topk` again, the labels column by column, and a vote query by
    query, by `unique` with counts and `argmax`, which gives the smallest of the most frequent labels.
    """
    rows = range(len(queries))
    nearest = near_labels = None
    for x, y in zip(bank.split(batch_size), bank_labels.split(batch_size)):
        distance, candidates = torch.cdist(queries, x), y.expand(len(queries), -1)
        if nearest is not None:
            distance = torch.cat([nearest, distance], dim=1)
            candidates = torch.cat([near_labels, candidates], dim=1)
        nearest, order = distance.topk(min(max(ks), distance.shape[1]), dim=1, largest=False)
        near_labels = torch.zeros_like(order)
        for row in rows:
            near_labels[row, :] = candidates[row][order[row]]
    accuracy = {}
    for k in ks:
        order = nearest.topk(k, dim=1, largest=False).indices
        voters = torch.cat([near_labels[rows, order[:, column]][:, None] for column in range(k)], dim=1)
        winner = torch.empty_like(labels)
        for row in rows:
            label, count = voters[row].unique(return_counts=True)
            winner[row] = label[count.argmax()]
        accuracy[k] = 100 * (winner == labels).float().mean().item()
    return accuracy


def nearest_by_cdist(bank: Tensor, queries: Tensor, k: int, batch_size: int) -> tuple[Tensor, Tensor]:
    """Distances and indices (N, k) by `torch.cdist` and `topk` over large batches of the bank, without any vote."""
    nearest = index = None
    for start in range(0, len(bank), batch_size):
        distance, found = torch.cdist(queries, bank[start : start + batch_size]).topk(k, dim=1, largest=False)
        found += start
        if nearest is not None:
            distance, found = torch.cat([nearest, distance], dim=1), torch.cat([index, found], dim=1)
        nearest, order = distance.topk(k, dim=1, largest=False)
        index = found.gather(1, order)
    return nearest, index
