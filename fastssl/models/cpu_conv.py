"""Replacements for convolutions that are slow in oneDNN, PyTorch's library on CPUs. Weights keep their names.

- 3x3 convolutions with an output of at most 2 x 2 become matrix products with patches: oneDNN takes twice as long for
  the gradient of their weights. The last stage of a ResNet at 64 pixels consists of them: two thirds of its weights.
- Depthwise convolutions run in float32 under autocast: in bf16 oneDNN takes up to 200 times as long for the gradients.

Tensors are NHWC inside. N images, H rows of the input, O rows of the output, C channels in, D channels out.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

_LARGEST = 2  # height and width of the output: for larger ones oneDNN is as fast


def use_cpu_convolutions(module: nn.Module) -> None:
    """Makes every such convolution of `module` compute in its faster way, in place."""
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d) and 1 < conv.groups == conv.in_channels and not isinstance(conv, _InFloat32):
            conv.__class__ = in_float32(type(conv))
        elif type(conv) is nn.Conv2d and _suits_patches(conv):
            conv.__class__ = PatchConv2d


def use_plain_convolutions(module: nn.Module) -> None:
    """Undoes `use_cpu_convolutions`."""
    for conv in module.modules():
        if isinstance(conv, (PatchConv2d, _InFloat32)):
            conv.__class__ = type(conv).__bases__[-1]


def _suits_patches(conv: nn.Conv2d) -> bool:
    shape = (conv.kernel_size, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return shape == ((3, 3), (1, 1), (1, 1), 1, "zeros") and conv.stride in ((1, 1), (2, 2))


class _InFloat32:
    """A forward that, under autocast, computes in float32 and returns autocast's dtype."""

    def forward(self, images: Tensor) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return super().forward(images)
        with torch.autocast("cpu", enabled=False):
            return super().forward(images.float()).to(torch.get_autocast_dtype("cpu"))


@cache
def in_float32(base: type[nn.Conv2d]) -> type[nn.Conv2d]:
    """A subclass of `base` (nn.Conv2d, or one that pads in its own way) that computes in float32 under autocast."""
    return type(f"Float32{base.__name__}", (_InFloat32, base), {})


class PatchConv2d(nn.Conv2d):
    """An nn.Conv2d with kernel size 3, padding 1 and one group; its results are equal up to rounding."""

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if height != width or (height - 1) // self.stride[0] >= _LARGEST or torch.compiler.is_compiling():
            return super().forward(images)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else images.dtype
        maps = _PatchProduct.apply(images.to(dtype), self.weight.to(dtype), self.stride[0])
        return maps if self.bias is None else maps + self.bias.to(dtype)[:, None, None]


class _PatchProduct(torch.autograd.Function):
    """(N, C, H, H) and (D, C, 3, 3) -> (N, D, O, O), channels_last."""

    @staticmethod
    def forward(ctx, images: Tensor, weight: Tensor, stride: int) -> Tensor:
        patches, matrix = cut_patches(images, stride), weight.permute(0, 2, 3, 1).flatten(1)  # (N O O, 9 C), (D, 9 C)
        ctx.save_for_backward(patches, matrix)
        ctx.height, ctx.stride = images.shape[-1], stride
        side = (images.shape[-1] - 1) // stride + 1
        return (patches @ matrix.T).unflatten(0, (-1, side, side)).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        if torch.is_grad_enabled():  # create_graph=True: the saved tensors have no graph, so terms would be missing
            raise RuntimeError("these convolutions cannot be differentiated twice: call use_plain_convolutions(model)")
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
    side = (height - 1) // stride + 1
    parts = patches.unflatten(1, (3, 3, -1)).unflatten(0, (-1, side, side))  # (N, O, O, 3, 3, C)
    dtype = torch.promote_types(patches.dtype, torch.float32)
    padded = parts.new_zeros(parts.shape[0], height + 2, height + 2, parts.shape[-1], dtype=dtype)
    reach = stride * (side - 1) + 1
    for row in range(3):
        for column in range(3):
            padded[:, row : row + reach : stride, column : column + reach : stride] += parts[:, :, :, row, column]
    return padded[:, 1:-1, 1:-1].to(patches.dtype).permute(0, 3, 1, 2)
