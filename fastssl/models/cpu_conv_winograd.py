"""3x3 convolutions in float32 by Winograd's minimal filtering along the columns: half the multiplications.

Four columns of the output take 6 products of transformed columns and weights, not 12: F(4, 3) of Lavin and Gray,
"Fast Algorithms for Convolutional Neural Networks" (2015). The kernel's rows are summed as they are, which leaves out
the padding above and below and rounds like the direct convolution: F(4 x 4, 3 x 3) has a quarter of the multiplications
but 4 to 8 times the error in the forward.

On two cores with AVX2, milliseconds of oneDNN and here for the forward and backward: 64 images of 64 channels, 16 x 16
pixels, 29 and 23; of 128, 8 x 8, 24 and 18; of 256, 4 x 4, 25 and 16; 16 images of 512 channels, 7 x 7, 111 and 61.

H rows, W columns, N images, T tiles of 4 columns, C channels in, D channels out. The 6 factors of a tile are its
points, after the points that its polynomials are evaluated at. Rows are in front, so that a row of the kernel
multiplies one matrix of all images.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastssl.models.cpu_conv_rows import refuse_second_derivative


class WinogradProducts(torch.autograd.Function):
    """(N, C, H, W) and (D, C, 3, 3), both float32 or wider -> (N, D, H, W), channels_last; stride and padding 1."""

    @staticmethod
    def forward(ctx, images: Tensor, weight: Tensor, stride: int) -> Tensor:
        points, kernels = points_of_images(images), points_of_weight(weight)
        ctx.save_for_backward(points, kernels)
        ctx.width = images.shape[-1]
        return maps_of_points(convolve(points, kernels), ctx.width)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        refuse_second_derivative()
        points, kernels = ctx.saved_tensors
        grad, grad_images, grad_weight = points_of_gradient(grad), None, None
        if ctx.needs_input_grad[0]:
            grad_images = gradient_of_images(gradient_of_points(grad, kernels), ctx.width)
        if ctx.needs_input_grad[1]:
            grad_weight = gradient_of_weight(gradient_of_kernels(grad, points))
        return grad_images, grad_weight, None


def convolve(points: Tensor, kernels: Tensor) -> Tensor:
    """(6, H, N, T, C), (6, 3, D, C) -> (6, H, N, T, D)."""
    sums = points.new_empty(*points.shape[:-1], kernels.shape[2])
    for k, outputs, rows in _kernel_rows(points.shape[1]):
        _matrices(sums[:, outputs]).baddbmm_(_matrices(points[:, rows]), kernels[:, k].mT, beta=int(k != 1))
    return sums


def gradient_of_points(grad: Tensor, kernels: Tensor) -> Tensor:
    """The gradient of the images' points: (6, H, N, T, D), (6, 3, D, C) -> (6, H, N, T, C)."""
    sums = grad.new_empty(*grad.shape[:-1], kernels.shape[3])
    for k, outputs, rows in _kernel_rows(grad.shape[1]):
        _matrices(sums[:, rows]).baddbmm_(_matrices(grad[:, outputs]), kernels[:, k], beta=int(k != 1))
    return sums


def gradient_of_kernels(grad: Tensor, points: Tensor) -> Tensor:
    """The gradient of the weights' points: (6, H, N, T, D), (6, H, N, T, C) -> (6, 3, D, C)."""
    sums = grad.new_empty(3, 6, grad.shape[-1], points.shape[-1])
    for k, outputs, rows in _kernel_rows(points.shape[1]):
        torch.bmm(_matrices(grad[:, outputs]).mT, _matrices(points[:, rows]), out=sums[k])
    return sums.transpose(0, 1)


def _kernel_rows(height: int) -> Iterator[tuple[int, slice, slice]]:
    """Each row of the kernel, with the rows of the output and of the images that it joins: the middle one joins all."""
    for k in (1, 0, 2):
        outputs = slice(max(0, 1 - k), min(height, height + 1 - k))
        yield k, outputs, slice(outputs.start + k - 1, outputs.stop + k - 1)


def _matrices(points: Tensor) -> Tensor:
    """(6, rows, N, T, C) -> (6, rows N T, C), the same memory."""
    return points.view(6, -1, points.shape[-1])


def _pairs(points: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum and difference of points 1 and 2, and of points 3 and 4, which are those at 1 and -1, and at 2 and -2."""
    return points[1] + points[2], points[1] - points[2], points[3] + points[4], points[3] - points[4]


def points_of_images(images: Tensor) -> Tensor:
    """(N, C, H, W) -> (6, H, N, T, C): the paper's B' of columns 4 t - 1 to 4 t + 4, those outside being 0."""
    width, tiles = images.shape[-1], -(-images.shape[-1] // 4)
    padded = images.new_empty(images.shape[2], images.shape[0], 4 * tiles + 2, images.shape[1])
    padded[:, :, 0], padded[:, :, width + 1 :] = 0, 0
    padded[:, :, 1 : width + 1] = images.permute(2, 0, 3, 1)
    a, b, c, d, e, f = (padded[:, :, i : i + 4 * tiles - 3 : 4] for i in range(6))
    points = images.new_empty(6, *a.shape)
    even, odd = torch.sub(e, c, alpha=4), torch.sub(d, b, alpha=4)
    torch.add(even, odd, out=points[1])
    torch.sub(even, odd, out=points[2])
    torch.sub(e, c, out=even)
    torch.sub(d, b, out=odd)
    torch.add(even, odd, alpha=2, out=points[3])
    torch.sub(even, odd, alpha=2, out=points[4])
    torch.sub(a, c, out=points[0]).mul_(4).add_(even)  # 4 a - 5 c + e
    torch.sub(f, d, out=points[5]).sub_(odd, alpha=4)  # 4 b - 5 d + f
    return points


def gradient_of_images(points: Tensor, width: int) -> Tensor:
    """The gradient of `points_of_images`: (6, H, N, T, C) -> (N, C, H, W), channels_last."""
    _, height, images, tiles, channels = points.shape
    padded = points.new_zeros(images, height, 4 * tiles + 2, channels)
    a, b, c, d, e, f = (padded[:, :, i : i + 4 * tiles - 3 : 4].transpose(0, 1) for i in range(6))
    sum_12, difference_12, sum_34, difference_34 = _pairs(points)
    torch.sub(points[5], difference_12, out=b).mul_(4).sub_(difference_34, alpha=2)
    torch.add(difference_12, difference_34, alpha=2, out=d).sub_(points[5], alpha=5)
    torch.add(sum_34, sum_12, alpha=4, out=c).add_(points[0], alpha=5).neg_()
    # a and e, b and f of neighbouring tiles are the same columns, which the lines above have written or left 0
    a.add_(points[0], alpha=4)
    e.add_(points[0]).add_(sum_12).add_(sum_34)
    f.add_(points[5])
    return padded[:, :, 1 : width + 1].contiguous().permute(0, 3, 1, 2)


def maps_of_points(points: Tensor, width: int) -> Tensor:
    """(6, H, N, T, D) -> (N, D, H, W), channels_last: the paper's A'."""
    _, height, images, tiles, channels = points.shape
    maps = points.new_empty(images, height, tiles, 4, channels)
    a, b, c, d = maps.transpose(0, 1).unbind(3)
    sum_12, difference_12, sum_34, difference_34 = _pairs(points)
    torch.add(sum_12, sum_34, out=a).add_(points[0])
    torch.add(difference_12, difference_34, alpha=2, out=b)
    torch.add(sum_12, sum_34, alpha=4, out=c)
    torch.add(difference_12, difference_34, alpha=8, out=d).add_(points[5])
    return maps.flatten(2, 3)[:, :, :width].contiguous().permute(0, 3, 1, 2)


def points_of_gradient(grad: Tensor) -> Tensor:
    """The gradient of `maps_of_points`: (N, D, H, W) -> (6, H, N, T, D)."""
    grad, tiles = grad.permute(2, 0, 3, 1), -(-grad.shape[-1] // 4)
    if grad.shape[2] < 4 * tiles:
        grad = torch.nn.functional.pad(grad, (0, 0, 0, 4 * tiles - grad.shape[2]))
    a, b, c, d = (grad[:, :, i::4] for i in range(4))
    points = grad.new_empty(6, *a.shape)
    even, odd = a + c, b + d
    torch.add(even, odd, out=points[1])
    torch.sub(even, odd, out=points[2])
    torch.add(a, c, alpha=4, out=even)
    torch.add(b, d, alpha=4, out=odd)
    torch.add(even, odd, alpha=2, out=points[3])
    torch.sub(even, odd, alpha=2, out=points[4])
    points[0], points[5] = a, d
    return points


def points_of_weight(weight: Tensor) -> Tensor:
    """(D, C, 3, 3) -> (6, 3, D, C): the paper's G of each row of the kernel."""
    a, b, c = weight.permute(3, 2, 0, 1)
    points = weight.new_empty(6, *a.shape)
    even = a + c
    torch.add(even, b, out=points[1]).div_(-6)
    torch.sub(b, even, out=points[2]).div_(6)
    torch.add(a, c, alpha=4, out=even)
    torch.add(even, b, alpha=2, out=points[3]).div_(24)
    torch.sub(even, b, alpha=2, out=points[4]).div_(24)
    torch.div(a, 4, out=points[0])
    points[5] = c
    return points


def gradient_of_weight(points: Tensor) -> Tensor:
    """The gradient of `points_of_weight`: (6, 3, D, C) -> (D, C, 3, 3), channels_last."""
    _, _, maps, channels = points.shape
    weight = points.new_empty(maps, 3, 3, channels)
    a, b, c = weight.permute(2, 1, 0, 3)
    sum_12, difference_12, sum_34, difference_34 = _pairs(points)
    torch.sub(sum_34, sum_12, alpha=4, out=a).add_(points[0], alpha=6).div_(24)
    torch.sub(difference_34, difference_12, alpha=2, out=b).div_(12)
    torch.sub(sum_34, sum_12, out=c).div_(6).add_(points[5])
    return weight.permute(0, 3, 1, 2)
