"""The queue losses in plain PyTorch, as published: the truth with which the fast paths are tested and compared.

Shapes: N = queries of this rank, K = rows of the queue, D = feature dimension, C = number of scales.
The rows of q, k and queue are unit vectors. Every function works in the dtype it is given (float64 for the truth) and
stores N x K values several times; `row_lse.py` and `row_lse_tiled.py` do the same work without storing them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .row_lse_tiled import TIE


def contrast_reference(q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """InfoNCE against the queue (MoCo, arXiv 1911.05722, Eq. 1): cross entropy of [q.k | q.queue] / temperature.

    Returns the mean loss () and above (N,) int64: for each query, how many queue rows are nearer to it than its key,
    by more than rounding.
    """
    positive_N = (q_ND * k_ND).sum(1)
    negative_NK = q_ND @ queue_KD.T
    logits = torch.cat([positive_N[:, None], negative_NK], dim=1) / temperature  # (N, 1 + K)
    target = torch.zeros(q_ND.shape[0], dtype=torch.int64, device=q_ND.device)
    above_N = (negative_NK > positive_N[:, None] + TIE).sum(1)
    return F.cross_entropy(logits, target), above_N


def align_reference(q_ND: Tensor, k_ND: Tensor, alpha: float) -> Tensor:
    """Alignment (arXiv 2005.10242, Eq. 15): the mean over pairs of ||q - k||^alpha, a scalar.

    The distance is computed from the difference, not as 2 - 2 q.k, so it is exact for near-identical rows and never
    negative. Identical rows get the gradient 0, even where that of the power is infinite (alpha < 2).
    """
    distance2_N = (q_ND - k_ND).square().sum(1)
    if alpha == 2:
        return distance2_N.mean()
    apart = distance2_N != 0  # true of NaN, which must reach the mean
    power_N = torch.where(apart, distance2_N, 1.0).pow(alpha / 2)
    return torch.where(apart, power_N, 0.0).mean()


def uniform_reference(q_ND: Tensor, queue_KD: Tensor, t: float, intra_batch: bool) -> Tensor:
    """Uniformity against the queue (arXiv 2005.10242, Eq. 17; with `intra_batch` Eq. 18), a scalar.

    The log of the mean of exp(-t d^2) over all pairs: the N K pairs of a query and a queue row and, with
    `intra_batch`, also the N (N - 1) / 2 pairs of queries.
    """
    distance2 = (2 - 2 * (q_ND @ queue_KD.T)).flatten()
    if intra_batch:
        wide_ND = q_ND.to(torch.promote_types(q_ND.dtype, torch.float32))  # pdist has no 16-bit kernel
        distance2 = torch.cat([distance2, torch.pdist(wide_ND).square().to(q_ND.dtype)])
    return distance2.mul(-t).exp().mean().log()


def row_lse_reference(
    x_ND: Tensor,
    y_KD: Tensor,
    scales: Sequence[float],
    positive_N: Tensor | None = None,
    exclude_self: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `row_lse` computes, with the N x K matrix and in the given dtype; arguments and results as there."""
    dot_NK = x_ND @ y_KD.T
    above_N = dot_NK.new_empty(0, dtype=torch.int32)
    if positive_N is not None:
        above_N = (dot_NK > positive_N[:, None] + TIE).sum(1, dtype=torch.int32)
    if exclude_self:
        dot_NK = dot_NK.masked_fill(torch.eye(*dot_NK.shape, dtype=torch.bool, device=dot_NK.device), -torch.inf)
    logits_CNK = torch.stack([scale * (dot_NK - 1) for scale in scales])
    mean_CND = torch.softmax(logits_CNK, dim=-1) @ y_KD
    return torch.logsumexp(logits_CNK, dim=-1), mean_CND, above_N
