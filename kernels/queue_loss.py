"""The whole loss in four launches: the pass over the queue, the one inside the batch, and two that finish.

In PyTorch, the algebra of `fastssl/losses.py` takes 90 launches for forward and gradient with all terms on, which at
N = 256 last longer than the pass itself. Here the finishing kernels do it, and already compute the gradient, so that
the backward is a single product.

Shapes: N = queries, K = rows of the queue, D = feature dimension, P = parts of the queue (see `row_lse_pass.py`).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor, library

from .launching import on_device_of, traceable
from .queue_loss_finish import finish_rows, finish_scalars
from .row_lse import rows_per_program
from .row_lse_pass import pass_over_queue
from .row_lse_plan import weights_need_float32
from .row_lse_tiled import refuse_second_derivative

_SCHEMA = (
    "(Tensor q_ND, Tensor k_ND, Tensor queue_KD, float contrast_weight, float temperature, float align_weight, "
    "float align_alpha, float uniform_weight, float uniform_t, bool intra_batch)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@library.triton_op("fastssl::queue_loss", mutates_args=(), schema=_SCHEMA)
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
    """The weighted loss of `fastssl.losses.moco_loss` and its gradient; contrast or uniform must have a weight.

    q_ND, k_ND: float32, queue_KD: float32, float16 or bfloat16; all contiguous unit rows. Returns the total (), the
    parts (5,) contrast, align, uniform, top1, top5 (contrast, top1 and top5, or uniform, are 0 without their weight),
    and three tensors for the backward. Only the total has a gradient, and only with respect to q.
    """
    num, pairs = q_ND.shape[0], float(q_ND.shape[0] * queue_KD.shape[0])
    contrast, uniform = contrast_weight > 0, uniform_weight > 0
    assert contrast or uniform
    scales = [1 / temperature] * contrast + [2 * uniform_t] * uniform
    widen = weights_need_float32(scales, queue_KD.dtype)
    with on_device_of(q_ND):
        positive_N = torch.linalg.vecdot(q_ND, k_ND) if contrast else None
        q_low_ND = q_ND.to(queue_KD.dtype)  # a cast inside the kernel would keep x out of shared memory
        main = inside = pass_over_queue(q_low_ND, queue_KD, scales, positive_N, False, widen)
        has_pairs = uniform and intra_batch and num > 1  # else the kernel does not read `inside`
        if has_pairs:
            pairs += num * (num - 1) / 2
            inside = pass_over_queue(q_low_ND, q_low_ND, scales[-1:], None, True, widen)
        terms_TN, gradient_ND = q_ND.new_empty(4, num), torch.empty_like(q_ND)
        uniform_gradient_ND = q_ND.new_empty(num if uniform else 0, q_ND.shape[1])
        rows = rows_per_program(q_ND)
        traceable(finish_rows)[(triton.cdiv(num, rows),)](
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
            scales[0],
            main.offsets[0],
            contrast_weight / num,
            align_alpha,
            align_weight / num,
            D=int(q_ND.shape[1]),  # a constant of the kernel, also under dynamic=True
            C=len(scales),
            CONTRAST=contrast,
            UNIFORM=uniform,
            INSIDE=has_pairs,
            SQUARED=align_alpha == 2,
            BLOCK_R=rows,
            BLOCK_P=16,
        )
        total, factor, parts = q_ND.new_empty(()), q_ND.new_empty(()), q_ND.new_empty(5)
        traceable(finish_scalars)[(1,)](
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
    refuse_second_derivative()
    gradient_ND, uniform_gradient_ND, factor = ctx.saved_tensors
    if len(uniform_gradient_ND):
        gradient_ND = torch.addcmul(gradient_ND, uniform_gradient_ND, factor)
    return gradient_ND * grad_total, *(None,) * 9


queue_loss.register_autograd(_gradient, setup_context=_save_for_gradient)
