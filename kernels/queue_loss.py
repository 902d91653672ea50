"""The whole loss in four launches: the pass over the queue, the one inside the batch, and two that finish.

The algebra of `fastssl/losses.py` takes some sixty small kernels when PyTorch runs it, several times what the pass
itself takes at N = 256; here two kernels do it, and leave the gradient ready so that the backward is one product.

Shapes: N = queries, K = rows of the queue, D = feature dimension, P = parts of the queue (see `row_lse_pass.py`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .row_lse import rows_per_program, sum_parts
from .row_lse_pass import pass_over_queue, weights_need_float32

_SCHEMA = (
    "(Tensor q_ND, Tensor k_ND, Tensor queue_KD, float contrast_weight, float temperature, float align_weight, "
    "float align_alpha, float uniform_weight, float uniform_t, bool intra_batch)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@triton.jit
def _finish_rows(
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
    """One program: BLOCK_R queries; a factor is the term's weight over N."""
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
        apart = distance2 > 0  # identical rows take the gradient 0
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
            # a pair stands in two rows: half of each sum, but the gradient comes from both
            total += sum_parts(inside_sum_ptr, N, row, valid, num_inside, BLOCK_P) / 2
            mean += sum_parts(inside_mean_ptr, N * D, element, inside, num_inside, BLOCK_P)
        tl.store(terms_ptr + 2 * N + row, total, mask=valid)
        tl.store(uniform_gradient_ptr + element, mean, mask=inside)


@triton.jit
def _finish_scalars(
    terms_ptr,  # (4, N) as _finish_rows leaves them
    parts_ptr,  # (5,) contrast, align, uniform, top1, top5
    total_ptr,  # ()
    uniform_factor_ptr,  # () what turns the uniform gradient's sums into a gradient
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

    align_mean = tl.sum(align, 0) / N
    total = align_weight * align_mean
    tl.store(parts_ptr + 1, align_mean)
    if CONTRAST:
        contrast_mean = tl.sum(contrast, 0) / N
        total += contrast_weight * contrast_mean
        tl.store(parts_ptr, contrast_mean)
        tl.store(parts_ptr + 3, 100 * tl.sum(top1, 0) / N)
        tl.store(parts_ptr + 4, 100 * tl.sum(top5, 0) / N)
    if UNIFORM:
        uniform_sum = tl.sum(uniform, 0)
        uniform_value = tl.log(uniform_sum / pairs) + uniform_offset
        total += uniform_weight * uniform_value
        tl.store(parts_ptr + 2, uniform_value)
        tl.store(uniform_factor_ptr, uniform_weight * uniform_scale / uniform_sum)
    tl.store(total_ptr, total)


@triton_op("fastssl::queue_loss", mutates_args=(), schema=_SCHEMA)
def queue_loss(
    q_ND: Tensor,
    k_ND: Tensor,
    queue_KD: Tensor,
    contrast_weight: float,
    temperature: float,
    align_weight: float,
    align_alpha: float,
    uniform_weight: float,
    uniform_t: float,
    intra_batch: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The weighted loss of `fastssl.losses.moco_loss` and its gradient; at least one of contrast and uniform is on.

    q_ND, k_ND: float32, queue_KD: float32, float16 or bfloat16, all contiguous unit rows. Returns the total (), the
    parts (5,) contrast, align, uniform, top1, top5 (undefined where the weight is 0), and what the backward needs.
    Only the total has a gradient, and only with respect to q.
    """
    num, num_keys = q_ND.shape[0], queue_KD.shape[0]
    contrast, uniform = contrast_weight > 0, uniform_weight > 0
    assert contrast or uniform
    scales = [1 / temperature] * contrast + [2 * uniform_t] * uniform
    widen = weights_need_float32(scales, queue_KD.dtype)
    positive_N = torch.linalg.vecdot(q_ND, k_ND) if contrast else None
    q_low_ND = q_ND.to(queue_KD.dtype)  # cast here: in the kernel it would keep x out of shared memory
    main = pass_over_queue(q_low_ND, queue_KD, scales, positive_N, False, widen)
    pairs, batch = float(num * num_keys), None
    if uniform and intra_batch and num > 1:
        pairs += num * (num - 1) / 2
        batch = pass_over_queue(q_low_ND, q_low_ND, scales[-1:], None, True, widen)

    terms_TN = q_ND.new_empty(4, num)
    gradient_ND = torch.empty_like(q_ND)
    uniform_gradient_ND = q_ND.new_empty(num if uniform else 0, q_ND.shape[1])
    _launch_finish_rows(
        (q_ND, k_ND, positive_N, main, batch, terms_TN, gradient_ND, uniform_gradient_ND),
        (scales[0], main.offsets[0], contrast_weight / num, align_alpha, align_weight / num),
        contrast,
        uniform,
    )
    total, factor, parts = q_ND.new_empty(()), q_ND.new_empty(()), q_ND.new_empty(5)
    wrap_triton(_finish_scalars)[(1,)](
        terms_TN,
        parts,
        total,
        factor,
        num,
        pairs,
        main.offsets[-1],
        scales[-1],
        contrast_weight,
        align_weight,
        uniform_weight,
        CONTRAST=contrast,
        UNIFORM=uniform,
        BLOCK=1024,
    )
    return total, parts, gradient_ND, uniform_gradient_ND, factor


def _launch_finish_rows(tensors: tuple, numbers: tuple[float, ...], contrast: bool, uniform: bool) -> None:
    q_ND, k_ND, positive_N, main, batch, terms_TN, gradient_ND, uniform_gradient_ND = tensors
    num, dim = q_ND.shape
    inside = main if batch is None else batch  # not read without pairs
    rows = rows_per_program(q_ND)
    wrap_triton(_finish_rows)[(triton.cdiv(num, rows),)](
        q_ND,
        k_ND,
        terms_TN if positive_N is None else positive_N,
        main.sum_PCN,
        main.mean_PCND,
        main.above_PN,
        inside.sum_PCN,
        inside.mean_PCND,
        terms_TN,
        gradient_ND,
        uniform_gradient_ND,
        num,
        main.sum_PCN.shape[0],
        inside.sum_PCN.shape[0],
        *numbers,
        D=dim,
        C=main.sum_PCN.shape[1],
        CONTRAST=contrast,
        UNIFORM=uniform,
        INSIDE=batch is not None,
        SQUARED=numbers[3] == 2,
        BLOCK_R=rows,
        BLOCK_P=16,
    )


@queue_loss.register_fake
def _(q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor, *settings: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num, dim = q_ND.shape
    uniform_weight = settings[4]
    uniform_gradient_ND = q_ND.new_empty(num if uniform_weight > 0 else 0, dim)
    return q_ND.new_empty(()), q_ND.new_empty(5), torch.empty_like(q_ND), uniform_gradient_ND, q_ND.new_empty(())


def _save_for_gradient(ctx, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:])


def _gradient(ctx, grad_total: Tensor, *grad_rest: None) -> tuple:
    gradient_ND, uniform_gradient_ND, factor = ctx.saved_tensors
    if len(uniform_gradient_ND):
        gradient_ND = torch.addcmul(gradient_ND, uniform_gradient_ND, factor)
    return gradient_ND * grad_total, *(None,) * 9


queue_loss.register_autograd(_gradient, setup_context=_save_for_gradient)
