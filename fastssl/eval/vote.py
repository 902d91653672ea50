"""The vote of the nearest neighbours, for all k at once, and the spaces in which neighbours are looked for.

Shapes: N queries, C feature dimensions, K neighbours. Ties between labels go to the smaller one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

SHIFTED = ("shift-norm", "shifted-norm")  # by the mean of a batch; the small-model project's code and README
REP_SPACES = ("original", "norm", *SHIFTED)
TEMPERATURE = 0.07  # of the weighted vote (Wu et al., arXiv 1805.01978)


def odd_ks(largest: int) -> list[int]:
    """1, 3, 5, ... up to `largest`."""
    return list(range(1, largest + 1, 2))


def to_rep_space(features: Tensor, rep_space: str) -> Tensor:
    """The features (n, C) as they are compared: unchanged (original), of unit length (norm), or shifted by their mean
    and then of unit length (shift-norm, shifted-norm; the small-model project passes a batch of shuffled images).

    Raises ValueError for another name.
    """
    if rep_space == "original":
        return features
    if rep_space == "norm":
        return normalize(features, dim=1)
    if rep_space in SHIFTED:
        return normalize(features - features.mean(dim=0), dim=1)
    raise ValueError(f"unknown representation space {rep_space!r}: choose {', '.join(REP_SPACES)}")


def vote_hits(
    distance: Tensor, labels: Tensor, truth: Tensor, ks: Sequence[int], num_classes: int, weighted: bool
) -> dict[int, int]:
    """How many queries each k of `ks` classifies correctly.

    distance: (N, K) squared, ascending; labels: (N, K) of the neighbours; truth: (N,) of the queries.
    weighted: a neighbour at distance d has a vote of exp(-d^2 / (2 TEMPERATURE)), which on unit rows is the
    exp(cosine / TEMPERATURE) of Wu et al. (arXiv 1805.01978) up to a factor; otherwise all votes count 1.
    """
    weight = torch.exp((distance[:, :1] - distance) / (2 * TEMPERATURE)) if weighted else torch.ones_like(distance)
    return {k: int((winner == truth).sum()) for k, winner in vote(labels, weight, ks, num_classes)}


def vote(labels: Tensor, weights: Tensor, ks: Sequence[int], num_classes: int) -> Iterator[tuple[int, Tensor]]:
    """Yields (k, winning labels (N,) int64) for each k of `ks`, ascending; ties go to the smaller label.

    labels: (N, K) int64 of the neighbours, nearest first; weights: (N, K), positive. Each neighbour adds to one count
    only, so the new winner is either the old one or that neighbour's label.
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
