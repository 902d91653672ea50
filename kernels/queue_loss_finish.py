"""The two small kernels that turn the pass over the queue into the loss and its gradient.

Shapes: N = queries, D = feature dimension, C = scales (1 or 2), P = parts of the queue (see `row_lse_pass.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .row_lse import sum_parts


@triton.jit
def finish_rows(
    # (N, D), (N, D), (N,); parts (P, C, N), (P, C, N, D), (P, N) of the pass over the queue and of that in the batch
    q_ptr,
    k_ptr,
    positive_ptr,
    sum_ptr,
    mean_ptr,
    above_ptr,
    inside_sum_ptr,
    inside_mean_ptr,
    # results: (4, N) contrast, align, sum of exp(-t d^2), queue rows above the key; gradients (N, D) and (N, D)
    terms_ptr,
    gradient_ptr,
    uniform_gradient_ptr,
    N,
    num_parts,
    num_inside,
    contrast_scale,
    contrast_offset,
    contrast_factor,
    align_alpha,
    align_factor,
    D: tl.constexpr,
    C: tl.constexpr,
    CONTRAST: tl.constexpr,
    UNIFORM: tl.constexpr,
    INSIDE: tl.constexpr,
    SQUARED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One program: BLOCK_R queries. A term's factor is its weight divided by N."""
    N = tl.cast(N, tl.int64)  # C * N * D may pass 2^31
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    element = tl.program_id(0).to(tl.int64) * (BLOCK_R * D) + tl.arange(0, BLOCK_R * D)
    valid = row < N
    inside = element < N * D
    at_RD = tl.reshape(element, [BLOCK_R, D])
    q = tl.load(q_ptr + at_RD, mask=valid[:, None], other=0.0)
    k = tl.load(k_ptr + at_RD, mask=valid[:, None], other=0.0)

    distance2 = tl.sum((q - k) * (q - k), 1)
    if SQUARED:
        align = distance2
        slope = tl.full([BLOCK_R], 2.0, tl.float32)
    else:
        apart = distance2 != 0  # identical rows get the gradient 0; true of NaN, which must stay
        log_distance2 = tl.log2(tl.where(apart, distance2, 1.0))
        align = tl.where(apart, tl.exp2(log_distance2 * (align_alpha / 2)), 0.0)
        slope = tl.where(apart, align_alpha * tl.exp2(log_distance2 * (align_alpha / 2 - 1)), 0.0)
    tl.store(terms_ptr + N + row, align, mask=valid)
    gradient = (q - k) * (slope * align_factor)[:, None]

    if CONTRAST:
        positive = tl.load(positive_ptr + row, mask=valid, other=0.0)
        total = tl.where(valid, sum_parts(sum_ptr, C * N, row, valid, num_parts, BLOCK_P), 1.0)
        mean = sum_parts(mean_ptr, C * N * D, element, inside, num_parts, BLOCK_P)
        mean = tl.reshape(mean, [BLOCK_R, D]) / total[:, None]
        log_odds = tl.log(total) + contrast_offset - contrast_scale * (positive - 1)
        small = tl.exp(-tl.abs(log_odds))
        contrast = tl.maximum(log_odds, 0.0) + tl.log(1 + small)
        negative = tl.where(log_odds > 0, 1.0, small) / (1 + small)  # softmax mass that is not on the key
        gradient += (mean - k) * (negative * (contrast_scale * contrast_factor))[:, None]
        tl.store(terms_ptr + row, contrast, mask=valid)
        above = sum_parts(above_ptr, N, row, valid, num_parts, BLOCK_P)
        tl.store(terms_ptr + 3 * N + row, above.to(tl.float32), mask=valid)
    tl.store(gradient_ptr + at_RD, gradient, mask=valid[:, None])

    if UNIFORM:
        total = sum_parts(sum_ptr + (C - 1) * N, C * N, row, valid, num_parts, BLOCK_P)
        mean = sum_parts(mean_ptr + (C - 1) * N * D, C * N * D, element, inside, num_parts, BLOCK_P)
        if INSIDE:
            # every pair appears in two rows: it counts half in either sum, but its gradient comes from both
            total += sum_parts(inside_sum_ptr, N, row, valid, num_inside, BLOCK_P) / 2
            mean += sum_parts(inside_mean_ptr, N * D, element, inside, num_inside, BLOCK_P)
        tl.store(terms_ptr + 2 * N + row, total, mask=valid)
        tl.store(uniform_gradient_ptr + element, mean, mask=inside)


@triton.jit
def finish_scalars(
    terms_ptr,  # (4, N) as finish_rows leaves them
    parts_ptr,  # (5,) contrast, align, uniform, top1, top5
    total_ptr,  # ()
    uniform_factor_ptr,  # () factor that turns the sums in uniform_gradient_ptr into a gradient
    N,
    pairs,
    uniform_offset,
    uniform_scale,
    contrast_weight,
    align_weight,
    uniform_weight,
    CONTRAST: tl.constexpr,
    UNIFORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the sums over the rows, in a fixed order."""
    contrast = tl.zeros([BLOCK], tl.float32)
    align = tl.zeros([BLOCK], tl.float32)
    uniform = tl.zeros([BLOCK], tl.float32)
    top1 = tl.zeros([BLOCK], tl.float32)
    top5 = tl.zeros([BLOCK], tl.float32)
    for first in range(0, N, BLOCK):
        n = first + tl.arange(0, BLOCK)
        align += tl.load(terms_ptr + N + n, mask=n < N, other=0.0)
        if CONTRAST:
            contrast += tl.load(terms_ptr + n, mask=n < N, other=0.0)
            above = tl.load(terms_ptr + 3 * N + n, mask=n < N, other=5.0)
            top1 += (above < 1).to(tl.float32)
            top5 += (above < 5).to(tl.float32)
        if UNIFORM:
            uniform += tl.load(terms_ptr + 2 * N + n, mask=n < N, other=0.0)

    contrast_mean = tl.sum(contrast, 0) / N
    align_mean = tl.sum(align, 0) / N
    uniform_value, uniform_factor = 0.0, 0.0
    if UNIFORM:
        uniform_sum = tl.sum(uniform, 0)
        uniform_value = tl.log(uniform_sum / pairs) + uniform_offset
        uniform_factor = uniform_weight * uniform_scale / uniform_sum
    tl.store(parts_ptr, contrast_mean)  # a part that is not computed is 0, so that all results follow from the inputs
    tl.store(parts_ptr + 1, align_mean)
    tl.store(parts_ptr + 2, uniform_value)
    tl.store(parts_ptr + 3, 100 * tl.sum(top1, 0) / N)
    tl.store(parts_ptr + 4, 100 * tl.sum(top5, 0) / N)
    tl.store(uniform_factor_ptr, uniform_factor)
    tl.store(total_ptr, align_weight * align_mean + contrast_weight * contrast_mean + uniform_weight * uniform_value)
