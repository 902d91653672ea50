"""The training loss of one rank: a weighted mix of contrast, align and uniform, each against the queue.

    total = contrast_weight * contrast + align_weight * align + uniform_weight * uniform

Shapes: N = queries of this rank, K = rows of the queue, D = feature dimension. Rows are unit vectors, the queue does
not hold this step's keys yet, and only q receives a gradient. `kernels/reference.py` has the published formulas.
`_tiled_terms` reduces them to row-wise log-sum-exps, so that one pass over the queue gives value and gradient
(derivation in `kernels/README.md`); `kernels/queue_loss.py` does all of it in Triton.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.kernels.reference import align_reference, contrast_reference, uniform_reference
from fastssl.kernels.row_lse_tiled import row_lse_tiled
from fastssl.loss_checks import check_loss_inputs, check_shapes, choose_kernel, refuse_forward_mode
from fastssl.loss_config import LossConfig

__all__ = ["LossConfig", "MoCoLoss", "check_loss_inputs", "choose_kernel", "moco_loss"]


class MoCoLoss(NamedTuple):
    """The loss and its terms, 0-dim tensors on the device.

    The terms are detached, so that a log may keep them, and None where their weight is 0.
    """

    total: Tensor  # the weighted mix, to call backward on
    contrast: Tensor | None
    align: Tensor | None
    uniform: Tensor | None
    top1: Tensor | None  # percent of queries whose key is nearer than every queue row; None without contrast
    top5: Tensor | None  # percent of queries to which fewer than 5 queue rows are nearer than their key

    def by_name(self) -> dict[str, Tensor]:
        """What was computed, for a log: detached, the total under "loss"."""
        parts = {"loss": self.total, **{name: getattr(self, name) for name in self._fields[1:]}}
        return {name: value.detach() for name, value in parts.items() if value is not None}


def moco_loss(q: Tensor, k: Tensor, queue: Tensor, config: LossConfig, kernel: str = "auto") -> MoCoLoss:
    """The loss of N queries against their keys and the queue.

    q, k: (N, D) unit rows; the gradient flows only to q. queue: (K, D) unit rows; the backward pass does not read it,
    so it may be overwritten as soon as this returns. q and k are converted to at least float32, also under autocast.
    kernel: a name, or "auto" for what `choose_kernel` says.

    Raises ValueError when shapes, devices or layouts do not fit, without a host sync (`check_loss_inputs` also looks at
    the values). Only "reference" can be differentiated twice or forwards; the others raise RuntimeError.
    """
    check_shapes(q, k, queue)
    # float64, which no Triton kernel takes, is for checking gradients with the plain PyTorch paths
    dtype = torch.float64 if q.dtype == torch.float64 else queue.dtype
    temperature = config.temperature if config.contrast_weight else None
    name, _ = choose_kernel(q.device, dtype, q.shape[1], kernel, temperature)
    if name != "reference":
        refuse_forward_mode(q)
    with torch.autocast(q.device.type, enabled=False):
        q, queue = q.to(torch.promote_types(q.dtype, torch.float32)), queue.detach()
        k = k.detach().to(q.dtype)
        if name == "triton" and (config.contrast_weight or config.uniform_weight):
            return _triton_loss(q, k, queue, config)
        if name == "reference":
            # autograd keeps the queue for the backward pass, so it gets a copy
            return _mix_terms(_reference_terms(q, k, queue.to(q.dtype, copy=True), config), config, q.dtype)
        return _mix_terms(_tiled_terms(q, k, queue, config), config, q.dtype)


def _reference_terms(q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor, config: LossConfig) -> dict[str, Tensor]:
    terms = {}
    if config.contrast_weight:
        terms["contrast"], above_N = contrast_reference(q_ND, k_ND, queue_KD, config.temperature)
        terms.update(_accuracy(above_N))  # torch 2.6 cannot compile |=
    if config.align_weight:
        terms["align"] = align_reference(q_ND, k_ND, config.align_alpha)
    if config.uniform_weight:
        terms["uniform"] = uniform_reference(q_ND, queue_KD, config.uniform_t, config.intra_batch)
    return terms


def _tiled_terms(q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor, config: LossConfig) -> dict[str, Tensor]:
    """The terms, computed from row-wise log-sum-exps; sums over rows are in float64, which is cheap at (N,)."""
    scales = [1 / config.temperature] if config.contrast_weight else []
    scales += [2 * config.uniform_t] if config.uniform_weight else []
    terms = {"align": align_reference(q_ND, k_ND, config.align_alpha)} if config.align_weight else {}
    if not scales:
        return terms
    positive_N = (q_ND * k_ND).sum(1)
    counted_N = positive_N.detach() if config.contrast_weight else None
    lse_CN, _, above_N = row_lse_tiled(q_ND, queue_KD, scales, counted_N)
    if config.contrast_weight:
        # logaddexp(lse, s) - s, where s is the positive logit; both are relative to the logit 1 / temperature
        terms["contrast"] = F.softplus(lse_CN[0].double() - (positive_N.double() - 1) / config.temperature).mean()
        terms.update(_accuracy(above_N))  # torch 2.6 cannot compile |=
    if config.uniform_weight:
        terms["uniform"] = _pool_pairs(lse_CN[-1], q_ND, queue_KD.shape[0], config)
    return terms


def _pool_pairs(lse_N: Tensor, q_ND: Tensor, queue_size: int, config: LossConfig) -> Tensor:
    """Log of the mean of exp(-t d^2) over the pairs with the queue (log-sum-exps `lse_N`) and inside the batch."""
    num = q_ND.shape[0]
    log_sum, pairs = torch.logsumexp(lse_N.double(), 0), num * queue_size
    if config.intra_batch and num > 1:
        inside_N = row_lse_tiled(q_ND, q_ND.detach(), [2 * config.uniform_t], None, exclude_self=True)[0][0]
        inside = torch.logsumexp(inside_N.double(), 0) - math.log(2)  # every pair is counted in two rows
        # This is the gradient of each query's own row alone; by symmetry the other rows add as much again.
        inside = 2 * inside - inside.detach()
        log_sum, pairs = torch.logaddexp(log_sum, inside), pairs + num * (num - 1) / 2
    return log_sum - math.log(pairs)


def _triton_loss(q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor, config: LossConfig) -> MoCoLoss:
    from fastssl.kernels.queue_loss import queue_loss  # only here: it needs Triton

    c = config
    weights = (c.contrast_weight, c.temperature, c.align_weight, c.align_alpha, c.uniform_weight, c.uniform_t)
    total, parts, *_ = queue_loss(q_ND, k_ND, queue_KD, *weights, c.intra_batch)
    computed = (c.contrast_weight, c.align_weight, c.uniform_weight, c.contrast_weight, c.contrast_weight)
    return MoCoLoss(total, *(part if weight else None for part, weight in zip(parts.unbind(), computed)))


def _accuracy(above_N: Tensor) -> dict[str, Tensor]:
    """top1 and top5 in percent, from the number of queue rows that are nearer to each query than its key."""
    return {"top1": 100 * (above_N < 1).float().mean(), "top5": 100 * (above_N < 5).float().mean()}


def _mix_terms(terms: dict[str, Tensor], config: LossConfig, dtype: torch.dtype) -> MoCoLoss:
    names = [name for name in ("contrast", "align", "uniform") if name in terms]
    total = sum(getattr(config, f"{name}_weight") * terms[name] for name in names)
    parts = {name: term.detach().to(dtype) for name, term in terms.items()}
    return MoCoLoss(total.to(dtype), *(parts.get(name) for name in MoCoLoss._fields[1:]))
