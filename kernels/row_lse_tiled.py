"""`row_lse` in PyTorch, tile by tile: the CPU path, whose extra memory does not grow with the queue.

A tile of dot products stays in the cache while it is turned into exponentials, sums and weighted means of queue rows,
so the (N, K) matrix is never stored. This runs on any device; GPUs use the Triton kernel in `row_lse.py`.

Shapes: N = rows of x, K = rows of y, D = feature dimension, C = number of scales.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, library

from .row_checks import check_rows

SCHEMA = (
    "(Tensor x_ND, Tensor y_KD, float[] scales, Tensor? positive_N=None, bool exclude_self=False)"
    " -> (Tensor, Tensor, Tensor)"
)
MAX_SCALE = 75.0  # float32 holds exp(scale) summed over any queue, and exp(-scale)
TIE = 1e-6  # a row counts as above another only by more than rounding
_TILE_N, _TILE_FLOATS = 256, 2**21  # 8 MB of dot products: small enough for the cache, large enough for the threads


@library.custom_op("fastssl::row_lse_tiled", mutates_args=(), schema=SCHEMA)
def row_lse_tiled(
    x_ND: Tensor,
    y_KD: Tensor,
    scales: Sequence[float],
    positive_N: Tensor | None = None,
    exclude_self: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The row-wise log-sum-exp of scaled dot products and its gradient, for each of C scales.

        lse[c, i] = log sum_j exp(scales[c] (x_i . y_j - 1))
        mean[c, i] = sum_j softmax_j(scales[c] x_i . y_j) y_j, so that d lse[c, i] / d x_i = scales[c] mean[c, i]
        above[i] = how many j have x_i . y_j > positive_i + TIE

    x_ND, y_KD: unit rows, any float dtype. positive_N: (N,) or None (then above is empty). scales: at most MAX_SCALE.
    exclude_self: leaves out j = i, for y = x. Returns lse (C, N) and mean (C, N, D) in float32 (float64 for float64 x),
    above (N,) int32. The gradient flows to x through lse, never to y. Raises ValueError for tensors that do not fit.
    """
    check_rows(contiguous=False, x_ND=x_ND, y_KD=y_KD)
    num, count = len(x_ND), len(scales)
    lse_CN, mean_CND, above_N = empty_results(x_ND, y_KD, scales, positive_N)
    above_N.zero_()
    dtype = lse_CN.dtype
    num_buffers = 1 if count == 1 and positive_N is None else 2
    tile_k = min(y_KD.shape[0], _TILE_FLOATS // _TILE_N // num_buffers)
    buffers = x_ND.new_empty(num_buffers, min(num, _TILE_N), tile_k, dtype=dtype)
    for first in range(0, num, _TILE_N):
        rows = slice(first, first + _TILE_N)
        x_nD = x_ND[rows].to(dtype) * scales[0]
        sum_Cn = x_nD.new_zeros(count, len(x_nD))
        mean_CnD = mean_CND[:, rows].zero_()
        for start in range(0, y_KD.shape[0], tile_k):
            y_kD = y_KD[start : start + tile_k].to(dtype)
            logit_nk, *work_nk = buffers[:, : len(x_nD), : len(y_kD)]
            torch.mm(x_nD, y_kD.T, out=logit_nk)
            if positive_N is not None:  # counted as 0.0 and 1.0: booleans are slow to make and to add
                threshold_n = (positive_N[rows, None] + TIE) * scales[0]
                above_N[rows] += torch.gt(logit_nk, threshold_n, out=work_nk[0]).sum(1).to(torch.int32)
            if exclude_self:
                logit_nk.diagonal(offset=first - start).fill_(-torch.inf)
            for c in reversed(range(count)):
                ratio = scales[c] / scales[0]
                weight_nk = (torch.mul(logit_nk, ratio, out=work_nk[0]) if c else logit_nk).exp_()
                sum_Cn[c] += weight_nk.sum(1)
                mean_CnD[c].addmm_(weight_nk, y_kD)
        mean_CnD /= sum_Cn[:, :, None]
        for c, scale in enumerate(scales):
            lse_CN[c, rows] = (sum_Cn[c].double().log() - scale).to(dtype)  # double, since two large numbers cancel
    return lse_CN, mean_CND, above_N


def empty_results(
    x_ND: Tensor,
    y_KD: Tensor,
    scales: Sequence[float],
    positive_N: Tensor | None = None,
    exclude_self: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for what `row_lse` returns; to torch.compile it tells the shapes and dtypes."""
    num, dim = x_ND.shape
    dtype = torch.promote_types(x_ND.dtype, torch.float32)
    lse_CN = x_ND.new_empty(len(scales), num, dtype=dtype)
    mean_CND = x_ND.new_empty(len(scales), num, dim, dtype=dtype)
    return lse_CN, mean_CND, x_ND.new_empty(0 if positive_N is None else num, dtype=torch.int32)


def save_for_gradient(ctx, inputs: tuple, output: tuple) -> None:
    """Saves only the mean rows for the backward, neither x nor the queue."""
    _, mean_CND, above_N = output
    ctx.mark_non_differentiable(mean_CND, above_N)
    ctx.save_for_backward(mean_CND)
    ctx.scales, ctx.dtype = inputs[2], inputs[0].dtype


def refuse_second_derivative() -> None:
    """Raises RuntimeError in a backward that is itself to be differentiated: its saved gradient has no graph."""
    if torch.is_grad_enabled():  # only with create_graph=True
        raise RuntimeError("the fast losses cannot be differentiated twice (create_graph): use --loss-kernel reference")


def row_lse_gradient(ctx, grad_lse_CN: Tensor, grad_mean: None, grad_above: None) -> tuple:
    """d lse[c, i] / d x_i = scales[c] mean[c, i], summed over the scales."""
    refuse_second_derivative()
    (mean_CND,) = ctx.saved_tensors
    parts = [mean_ND * (scale * grad_N)[:, None] for scale, grad_N, mean_ND in zip(ctx.scales, grad_lse_CN, mean_CND)]
    return sum(parts[1:], parts[0]).to(ctx.dtype), None, None, None, None


row_lse_tiled.register_fake(empty_results)
row_lse_tiled.register_autograd(row_lse_gradient, setup_context=save_for_gradient)
