"""Row-wise log-sum-exp of scaled dot products against the queue, with its gradient: the Triton operator.

    lse[c, i] = log sum_j exp(scales[c] (x_i . y_j - 1))        mean[c, i] = sum_j softmax_j(scales[c] x_i . y_j) y_j

The mean gives the gradient, d lse[c, i] / d x_i = scales[c] mean[c, i]: attention whose values are its keys. Both come
from one pass over the queue (`row_lse_pass.py`), so the backward does not need the queue.

Shapes: N = rows of x, K = rows of y (the queue), D = feature dimension, C = scales (1 or 2), P = parts of the queue.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor, library

from .launching import on_device_of, traceable
from .row_checks import check_rows
from .row_lse_blocks import DIMS
from .row_lse_pass import pass_over_queue
from .row_lse_plan import weights_need_float32
from .row_lse_tiled import MAX_SCALE, SCHEMA, empty_results, row_lse_gradient, save_for_gradient


@triton.jit
def sum_parts(part_ptr, stride, offsets, mask, num_parts, BLOCK_P: tl.constexpr):
    """Adds the parts at the given offsets, in a fixed order. stride: elements in a part."""
    p = tl.arange(0, BLOCK_P).to(tl.int64)[:, None]
    total = tl.load(part_ptr + p * stride + offsets[None, :], mask=(p < num_parts) & mask[None, :], other=0)
    for first in range(BLOCK_P, num_parts, BLOCK_P):
        at = first + p
        total += tl.load(part_ptr + at * stride + offsets[None, :], mask=(at < num_parts) & mask[None, :], other=0)
    return tl.sum(total, 0)


@triton.jit
def _add_parts(
    # per part of the queue: (P, C, N), (P, C, N, D) and (P, N)
    sum_ptr,
    part_mean_ptr,
    part_above_ptr,
    # results: (C, N), (C, N, D) and (N,)
    lse_ptr,
    mean_ptr,
    above_ptr,
    N,
    num_parts,
    offset0,
    offset1,
    D: tl.constexpr,
    C: tl.constexpr,
    COUNT_ABOVE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One program: BLOCK_R rows of the (C, N) results."""
    N = tl.cast(N, tl.int64)  # C * N * D may pass 2^31
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = sum_parts(sum_ptr, C * N, row, row < C * N, num_parts, BLOCK_P)
    total = tl.where(row < C * N, total, 1.0)
    tl.store(lse_ptr + row, tl.log(total) + tl.where(row < N, offset0, offset1), mask=row < C * N)
    element = tl.program_id(0).to(tl.int64) * (BLOCK_R * D) + tl.arange(0, BLOCK_R * D)
    mean = sum_parts(part_mean_ptr, C * N * D, element, element < C * N * D, num_parts, BLOCK_P)
    mean = tl.reshape(mean, [BLOCK_R, D]) / total[:, None]
    tl.store(mean_ptr + tl.reshape(element, [BLOCK_R, D]), mean, mask=row[:, None] < C * N)
    if COUNT_ABOVE:
        above = sum_parts(part_above_ptr, N, row, row < N, num_parts, BLOCK_P)
        tl.store(above_ptr + row, above, mask=row < N)


@library.triton_op("fastssl::row_lse", mutates_args=(), schema=SCHEMA)
def row_lse(
    x_ND: Tensor,
    y_KD: Tensor,
    scales: Sequence[float],
    positive_N: Tensor | None = None,
    exclude_self: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The row-wise log-sum-exp of scaled dot products and its gradient, for one scale or two in the same pass.

        lse[c, i] = log sum_j exp(scales[c] (x_i . y_j - 1))
        mean[c, i] = sum_j softmax_j(scales[c] x_i . y_j) y_j, so that d lse[c, i] / d x_i = scales[c] mean[c, i]
        above[i] = how many j have x_i . y_j > positive_i + TIE

    x_ND, y_KD: unit rows, contiguous, float32, float16 or bfloat16. x is rounded to the dtype of y for the tensor
    cores; sums are float32. D must be in DIMS, scales in (0, MAX_SCALE]. positive_N: (N,) float32 or None (then above
    is empty). exclude_self: leaves out j = i, for y = x. Returns lse (C, N) and mean (C, N, D) float32, above (N,)
    int32, with the same bits every time. The gradient flows to x through lse, never to y. Raises ValueError for tensors
    that do not fit.
    """
    check_rows(x_ND=x_ND, y_KD=y_KD)
    num, dim, count = x_ND.shape[0], int(x_ND.shape[1]), len(scales)
    if dim not in DIMS:
        raise ValueError(f"D = {dim} is not one of {', '.join(map(str, DIMS))}: take row_lse_tiled")
    assert count in (1, 2) and max(scales) <= MAX_SCALE
    assert positive_N is None or (positive_N.shape == (num,) and positive_N.is_contiguous())
    widen = weights_need_float32(scales, y_KD.dtype)
    x_ND = x_ND.to(y_KD.dtype)  # a cast inside the kernel would keep x out of shared memory
    with on_device_of(x_ND):
        sum_PCN, mean_PCND, above_PN, offsets = pass_over_queue(x_ND, y_KD, scales, positive_N, exclude_self, widen)
        lse_CN, mean_CND, above_N = empty_results(x_ND, y_KD, scales, positive_N)
        rows = rows_per_program(x_ND)
        traceable(_add_parts)[(triton.cdiv(count * num, rows),)](
            sum_PCN,
            mean_PCND,
            above_PN,
            lse_CN,
            mean_CND,
            above_N,
            num,
            sum_PCN.shape[0],
            offsets[0],
            offsets[-1],
            D=dim,
            C=count,
            COUNT_ABOVE=positive_N is not None,
            BLOCK_R=rows,
            BLOCK_P=16,
        )
    return lse_CN, mean_CND, above_N


row_lse.register_fake(empty_results)
row_lse.register_autograd(row_lse_gradient, setup_context=save_for_gradient)


def rows_per_program(x_ND: Tensor) -> int:
    """How many rows a program of the kernels that add parts takes: 256 elements; more in the interpreter."""
    return max(1, 256 // int(x_ND.shape[1])) if x_ND.is_cuda else 32
