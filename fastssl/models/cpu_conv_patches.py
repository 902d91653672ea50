"""3x3 convolutions of small images as one product with patches: for 16 bits, where it rounds each output once.

Tensors are NHWC inside. N images, H rows of the input, O rows of the output, C channels in, D channels out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastssl.models.cpu_conv_rows import output_side, refuse_second_derivative


class PatchProducts(torch.autograd.Function):
    """(N, C, H, H) and (D, C, 3, 3) -> (N, D, O, O), channels_last."""

    @staticmethod
    def forward(ctx, images: Tensor, weight: Tensor, stride: int) -> Tensor:
        patches, matrix = cut_patches(images, stride), weight.permute(0, 2, 3, 1).flatten(1)  # (N O O, 9 C), (D, 9 C)
        ctx.save_for_backward(patches, matrix)
        ctx.height, ctx.stride = images.shape[-1], stride
        side = output_side(images.shape[-1], stride)
        return (patches @ matrix.T).unflatten(0, (-1, side, side)).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        refuse_second_derivative()
        patches, matrix = ctx.saved_tensors
        grad, grad_images, grad_weight = grad.permute(0, 2, 3, 1).flatten(0, 2), None, None
        if ctx.needs_input_grad[0]:
            grad_images = add_patches(grad @ matrix, ctx.height, ctx.stride)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.T @ patches).unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2)
        return grad_images, grad_weight, None


def cut_patches(images: Tensor, stride: int) -> Tensor:
    """(N, C, H, H) -> (N O O, 9 C): the 3 x 3 patch that each output sees, row by row."""
    padded = pad(images.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    windows = padded.unfold(1, 3, stride).unfold(2, 3, stride)  # (N, O, O, C, 3, 3)
    return windows.permute(0, 1, 2, 4, 5, 3).reshape(-1, 9 * images.shape[1])


def add_patches(patches: Tensor, height: int, stride: int) -> Tensor:
    """The transpose of `cut_patches`: (N O O, 9 C) -> (N, C, H, H), summed in float32 at least."""
    side = output_side(height, stride)
    parts = patches.unflatten(1, (3, 3, -1)).unflatten(0, (-1, side, side))  # (N, O, O, 3, 3, C)
    dtype = torch.promote_types(patches.dtype, torch.float32)
    padded = parts.new_zeros(parts.shape[0], height + 2, height + 2, parts.shape[-1], dtype=dtype)
    reach = stride * (side - 1) + 1
    for row in range(3):
        for column in range(3):
            padded[:, row : row + reach : stride, column : column + reach : stride] += parts[:, :, :, row, column]
    return padded[:, 1:-1, 1:-1].to(patches.dtype).permute(0, 3, 1, 2)
