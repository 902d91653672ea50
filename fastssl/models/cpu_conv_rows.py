"""3x3 convolutions of small images as products of matrices that leave the padding out.

At the edge of an image a kernel sees padding: of the 9 products for each output pixel 4 remain where the image has
2 x 2 pixels, 6.25 of 4 x 4. Here each kernel row and output column is one product, of matrices that lie in the images
and weights as they are, with the images' rows in front.

On two cores with AVX2, 64 images of 512 channels, milliseconds of oneDNN and here: the gradient of the weights 49 to 71
and 5 at 2 x 2 pixels, 72 and 30 at 4 x 4; the forward 10 to 12 and 5 to 7 at 2 x 2, about the same (31, 30) at 4 x 4.

H rows of the input, N images, W columns, O rows and columns of the output, C channels in, D channels out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d
from torch.nn.grad import conv2d_input

_FORWARD = 2  # the largest output whose forward and gradient of the images are not left to oneDNN


class Product(NamedTuple):
    """What one product multiplies: maps[outputs, :, column] and images[rows, :, columns] through weight[:, k, taps]."""

    outputs: slice  # rows of the output,
    column: int  # and its column
    rows: slice  # of the image
    columns: slice
    k: int  # row of the kernel
    taps: slice  # columns of the kernel


class RowProducts(torch.autograd.Function):
    """(N, C, H, H) and (D, C, 3, 3), both float32 or wider -> (N, D, O, O), channels_last; padding 1."""

    @staticmethod
    def forward(ctx, images: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.stride = stride
        if output_side(images.shape[-1], stride) > _FORWARD:
            return conv2d(images, weight, stride=stride, padding=1)
        return convolve(images, weight, stride)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        refuse_second_derivative()
        images, weight = ctx.saved_tensors
        grad_images, grad_weight = None, None
        if ctx.needs_input_grad[0]:
            if grad.shape[-1] > _FORWARD:
                grad_images = conv2d_input(images.shape, weight, grad, ctx.stride, padding=1)
            else:
                grad_images = images_gradient(grad, weight, images.shape[-1], ctx.stride)
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient(grad, images, ctx.stride)
        return grad_images, grad_weight, None


def refuse_second_derivative() -> None:
    """Raises RuntimeError with create_graph=True: the saved tensors have no graph, so terms would be missing."""
    if torch.is_grad_enabled():
        raise RuntimeError("these convolutions cannot be differentiated twice: call use_plain_convolutions(model)")


def output_side(height: int, stride: int) -> int:
    """O for images of H rows."""
    return (height - 1) // stride + 1


def products(height: int, stride: int) -> Iterator[Product]:
    """All products of a convolution; those of a pixel's kernel rows are to be summed."""
    side = output_side(height, stride)
    for k in range(3):
        # output row o sees image row stride * o + k - 1
        first, last = (1 if k == 0 else 0), min(side, (height - k) // stride + 1)
        if first >= last:  # this row of the kernel sees nothing but padding
            continue
        rows = slice(stride * first + k - 1, stride * (last - 1) + k, stride)
        for column in range(side):
            left = stride * column - 1  # the image's column under the kernel's first
            taps = slice(max(0, -left), min(3, height - left))
            yield Product(slice(first, last), column, rows, slice(left + taps.start, left + taps.stop), k, taps)


def convolve(images: Tensor, weight: Tensor, stride: int) -> Tensor:
    """The convolution: (N, C, H, H), (D, C, 3, 3) -> (N, D, O, O)."""
    side = output_side(images.shape[-1], stride)
    images, weight = rows_first(images), weight.permute(0, 2, 3, 1)  # (H, N, W, C), (D, 3, 3, C)
    maps = images.new_zeros(side, images.shape[1], side, weight.shape[0])
    for p in products(images.shape[0], stride):
        seen = images[p.rows, :, p.columns].flatten(2).flatten(0, 1)
        maps[p.outputs, :, p.column].view(-1, weight.shape[0]).addmm_(seen, weight[:, p.k, p.taps].flatten(1).T)
    return images_first(maps)


def images_gradient(grad: Tensor, weight: Tensor, height: int, stride: int) -> Tensor:
    """The gradient of the images: (N, D, O, O), (D, C, 3, 3) -> (N, C, H, H)."""
    grad, weight = rows_first(grad), weight.permute(0, 2, 3, 1)  # (O, N, O, D), (D, 3, 3, C)
    images = grad.new_zeros(height, grad.shape[1], height, weight.shape[-1])
    for p in products(height, stride):
        seen = images[p.rows, :, p.columns]
        seen += (grad[p.outputs, :, p.column] @ weight[:, p.k, p.taps].flatten(1)).view(seen.shape)
    return images_first(images)


def weight_gradient(grad: Tensor, images: Tensor, stride: int) -> Tensor:
    """The gradient of the weights: (N, D, O, O), (N, C, H, H) -> (D, C, 3, 3)."""
    grad, images = rows_first(grad), rows_first(images)  # (O, N, O, D), (H, N, W, C)
    weight = grad.new_zeros(grad.shape[-1], 3, 3, images.shape[-1])
    for p in products(images.shape[0], stride):
        seen = images[p.rows, :, p.columns].flatten(2).flatten(0, 1)
        weight[:, p.k, p.taps].view(len(weight), -1).addmm_(grad[p.outputs, :, p.column].flatten(0, 1).T, seen)
    return weight.permute(0, 3, 1, 2)


def rows_first(images: Tensor) -> Tensor:
    """(N, C, H, W) -> (H, N, W, C): a row of the image, of all images, is then a matrix."""
    return images.permute(2, 0, 3, 1).contiguous()


def images_first(rows: Tensor) -> Tensor:
    """The inverse of `rows_first`, channels_last."""
    return rows.permute(1, 3, 0, 2).contiguous(memory_format=torch.channels_last)
