"""Replacements for convolutions that are slow in oneDNN, PyTorch's library on CPUs. Weights keep their names.

- 3x3 convolutions of small images become matrix products, because oneDNN takes long for the gradient of their weights.
  In float32 they follow Winograd (`cpu_conv_winograd.py`) or, in the smallest images, leave the padding out
  (`cpu_conv_rows.py`); in 16 bits, where either would round more, they multiply patches (`cpu_conv_patches.py`).
- Depthwise convolutions run in float32 under autocast: in bf16 oneDNN takes up to 200 times as long for the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from fastssl.models.cpu_conv_patches import PatchProducts
from fastssl.models.cpu_conv_rows import RowProducts, output_side
from fastssl.models.cpu_conv_winograd import WinogradProducts

LARGEST = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 4, torch.float64: 4}  # the most rows of the output
WINOGRAD = range(4, 29)  # rows of images whose convolutions with stride 1 follow Winograd in float32,
FEWEST_CHANNELS = 64  # with so many channels: the transforms of fewer cost what the products save


def use_cpu_convolutions(module: nn.Module) -> None:
    """Makes every such convolution of `module` compute in its faster way, in place."""
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d) and 1 < conv.groups == conv.in_channels and not isinstance(conv, _InFloat32):
            conv.__class__ = in_float32(type(conv))
        elif type(conv) is nn.Conv2d and _suits_products(conv):
            conv.__class__ = SmallConv2d


def use_plain_convolutions(module: nn.Module) -> None:
    """Undoes `use_cpu_convolutions`."""
    for conv in module.modules():
        if isinstance(conv, (SmallConv2d, _InFloat32)):
            conv.__class__ = type(conv).__bases__[-1]


def _suits_products(conv: nn.Conv2d) -> bool:
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


class SmallConv2d(nn.Conv2d):
    """An nn.Conv2d with kernel size 3, padding 1 and one group; its results are equal up to rounding."""

    def forward(self, images: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else images.dtype
        multiply = None if torch.compiler.is_compiling() else self._products(images.shape[-2:], dtype)
        if multiply is None:
            return super().forward(images)
        maps = multiply(images.to(dtype), self.weight.to(dtype), self.stride[0])
        return maps if self.bias is None else maps + self.bias.to(dtype)[:, None, None]

    def _products(self, shape: tuple[int, int], dtype: torch.dtype) -> Callable[[Tensor, Tensor, int], Tensor] | None:
        """The fastest way for images of that height and width; None is oneDNN's."""
        height, width = shape
        if height != width or dtype not in LARGEST:
            return None
        wide = min(self.in_channels, self.out_channels) >= FEWEST_CHANNELS
        if dtype.itemsize >= 4 and self.stride == (1, 1) and height in WINOGRAD and wide:
            return WinogradProducts.apply
        if output_side(height, self.stride[0]) > LARGEST[dtype]:
            return None
        return PatchProducts.apply if dtype.itemsize == 2 else RowProducts.apply
