"""The single pass over the queue, in Triton: weights exp(scale (x . y - 1)), their sums and the weighted sums of rows.

A tile of y is read once and used in both matrix products; nothing of size N x K is stored. Unit rows bound the
exponent, so no running maximum is needed. For small N the queue is cut into parts, so that every multiprocessor has
work; the caller adds the parts in a fixed order. For derivation and accuracy see `kernels/README.md`.

Shapes: N = rows of x, K = rows of y (the queue), D = feature dimension, C = scales (1 or 2), P = parts of the queue.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import traceable
from .row_lse_blocks import find_blocks
from .row_lse_plan import dot_precision, split_queue, weight_factors
from .row_lse_tiled import TIE

# Fused multiply-adds are faster here and no less exact; if this is not set, Triton 3.9 warns and 3.10 turns them off.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
_TIE = tl.constexpr(TIE)


@triton.jit
def _as_operand(weight, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """The weight as the tensor cores round it, so that the sums and the products use the same numbers."""
    if dtype == tl.float32 and PRECISION == "tf32":
        # TF32 drops 13 bits: rounded here, since cut off, all weights and so their sum would be too small
        bits = tl.minimum(weight.to(tl.int32, bitcast=True), 0x7FC00000)  # a GPU's NaN, 0x7FFFFFFF, would round to -0
        weight = ((bits + 4096) & -8192).to(tl.float32, bitcast=True)
    return weight.to(dtype)


@triton.jit
def _pass_over_queue(
    # inputs: (N, D), (K, D) and (N,)
    x_ptr,
    y_ptr,
    positive_ptr,
    # results per part of the queue: (P, C, N), (P, C, N, D) and (P, N)
    sum_ptr,
    mean_ptr,
    above_ptr,
    N,
    K,
    keys_per_part,
    # weight = exp2(scale * dot - shift)
    scale0,
    shift0,
    scale1,
    shift1,
    D: tl.constexpr,
    C: tl.constexpr,
    COUNT_ABOVE: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN_WEIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_N rows of x against one part of the queue."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # int64: K * D may pass 2^31
    part = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, D)
    x = tl.load(x_ptr + n[:, None] * D + d[None, :], mask=n[:, None] < N, other=0.0)
    sum0 = tl.zeros([BLOCK_N], tl.float32)
    mean0 = tl.zeros([BLOCK_N, D], tl.float32)
    if C == 2:
        sum1 = tl.zeros([BLOCK_N], tl.float32)
        mean1 = tl.zeros([BLOCK_N, D], tl.float32)
    if COUNT_ABOVE:
        threshold = tl.load(positive_ptr + n, mask=n < N, other=0.0) + _TIE
        above = tl.zeros([BLOCK_N], tl.int32)

    k = tl.arange(0, BLOCK_K)
    within_tile = k[:, None] * D + d[None, :]
    first = part * keys_per_part
    for start in range(first, tl.minimum(first + keys_per_part, K), BLOCK_K):
        if EVEN_K:
            y = tl.load(y_ptr + start * D + within_tile)
        else:
            y = tl.load(y_ptr + start * D + within_tile, mask=k[:, None] < K - start, other=0.0)
        dot = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        if EXCLUDE_SELF:
            dot = tl.where(start + k[None, :] == n[:, None], -float("inf"), dot)
        if not EVEN_K:
            dot = tl.where(k[None, :] < K - start, dot, -float("inf"))
        if COUNT_ABOVE:
            above += tl.sum((dot > threshold[:, None]).to(tl.int32), 1)
        values = y.to(tl.float32) if WIDEN_WEIGHTS else y
        weight = _as_operand(tl.exp2(tl.fma(dot, scale0, -shift0)), values.dtype, PRECISION)
        sum0 += tl.sum(weight.to(tl.float32), 1)
        mean0 = tl.dot(weight, values, mean0, input_precision=PRECISION)
        if C == 2:
            weight = _as_operand(tl.exp2(tl.fma(dot, scale1, -shift1)), values.dtype, PRECISION)
            sum1 += tl.sum(weight.to(tl.float32), 1)
            mean1 = tl.dot(weight, values, mean1, input_precision=PRECISION)

    row = part * C * N + n
    tl.store(sum_ptr + row, sum0, mask=n < N)
    tl.store(mean_ptr + row[:, None] * D + d[None, :], mean0, mask=n[:, None] < N)
    if C == 2:
        tl.store(sum_ptr + N + row, sum1, mask=n < N)
        tl.store(mean_ptr + (N + row[:, None]) * D + d[None, :], mean1, mask=n[:, None] < N)
    if COUNT_ABOVE:
        tl.store(above_ptr + part * N + n, above, mask=n < N)


class QueuePass(NamedTuple):
    """The results of `pass_over_queue` for each of P parts of the queue, still to be added."""

    sum_PCN: Tensor  # float32, sum_j weight_j
    mean_PCND: Tensor  # float32, sum_j weight_j y_j, not yet divided by the sum
    above_PN: Tensor  # int32, how many j are above the positive; (P, 0) if that was not asked for
    offsets: list[float]  # per scale: log(sum) + offset = log sum_j exp(scale (x . y_j - 1))


def pass_over_queue(
    x_ND: Tensor, y_KD: Tensor, scales: Sequence[float], positive_N: Tensor | None, exclude_self: bool, widen: bool
) -> QueuePass:
    """Launches the kernel, inside a `triton_op`. Arguments as in `row_lse`, but x has the dtype of y.

    widen: the answer of `weights_need_float32`.
    """
    assert x_ND.dtype == y_KD.dtype
    num, num_keys, count = x_ND.shape[0], y_KD.shape[0], len(scales)
    dim = int(x_ND.shape[1])  # a constant of the kernel, even if torch.compile passes a symbol
    blocks, multiprocessors = find_blocks(x_ND.device, dim, count, 4 if widen else y_KD.element_size())
    parts, keys_per_part = split_queue(int(num), int(num_keys), blocks, multiprocessors)
    factors = [weight_factors(scale, y_KD.dtype, widen) for scale in scales]
    sum_PCN = x_ND.new_empty(parts, count, num, dtype=torch.float32)
    mean_PCND = x_ND.new_empty(parts, count, num, dim, dtype=torch.float32)
    above_PN = x_ND.new_empty(parts, 0 if positive_N is None else num, dtype=torch.int32)
    traceable(_pass_over_queue)[(triton.cdiv(num, blocks.block_n), parts)](
        x_ND,
        y_KD,
        sum_PCN if positive_N is None else positive_N,
        sum_PCN,
        mean_PCND,
        above_PN,
        num,
        num_keys,
        keys_per_part,
        *factors[0],
        *factors[-1],
        D=dim,
        C=count,
        COUNT_ABOVE=positive_N is not None,
        EXCLUDE_SELF=exclude_self,
        EVEN_K=num_keys % blocks.block_k == 0,
        BLOCK_N=blocks.block_n,
        BLOCK_K=blocks.block_k,
        WIDEN_WEIGHTS=widen,
        PRECISION="tf32" if widen else dot_precision(),  # TF32 holds float16 values exactly
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
    offsets = [shift * math.log(2) - scale for scale, (_, shift) in zip(scales, factors)]
    return QueuePass(sum_PCN, mean_PCND, above_PN, offsets)
