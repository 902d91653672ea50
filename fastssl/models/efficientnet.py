"""EfficientNet-B0 to B3 (Tan and Le, arXiv 1905.11946) as in the small-model project (arXiv 2107.14762).

Weights trained there compute the same here, under the same names. Unlike torchvision's (`tv_efficientnet_*`):
  - convolutions pad as TensorFlow's "same", more on the right and bottom where the padding is odd, and **for the
    network's nominal image size** (224, 240, 260, 300), whatever the image: timm's tf_efficientnet_* pads for the
    actual size, which at 224 pixels agrees for B0 alone;
  - BN has eps 1e-3 and momentum 0.01;
  - squeeze-and-excitation takes a quarter of the block's input channels;
  - a block's branch is dropped with a probability that grows by 0.2 / blocks from block to block; Dropout of 0.2
    (B0, B1) or 0.3 lies before the classifier, which is `fc`.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models._utils import _make_divisible as make_divisible
from torchvision.ops import StochasticDepth

# repeats, kernel, stride, expansion, channels
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
# width, depth, nominal image size, dropout
SIZES = {"b0": (1.0, 1.0, 224, 0.2), "b1": (1.0, 1.1, 240, 0.2), "b2": (1.1, 1.2, 260, 0.3), "b3": (1.2, 1.4, 300, 0.3)}

_batchnorm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)


class SameConv2d(nn.Conv2d):
    """A convolution whose padding is TensorFlow's "same" for inputs of `nominal` pixels a side.

    The padding is computed in forward, since the CIFAR stem changes the stride of a layer.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int, *, stride: int, nominal: int, groups: int = 1) -> None:
        super().__init__(c_in, c_out, kernel, stride, groups=groups, bias=False)
        self.nominal = nominal

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        total = max((math.ceil(self.nominal / stride) - 1) * stride + kernel - self.nominal, 0)
        before, after = total // 2, total - total // 2
        if before == after:
            return F.conv2d(x, self.weight, None, self.stride, before, groups=self.groups)
        return super().forward(F.pad(x, (before, after, before, after)))


class Block(nn.Module):
    """Mobile inverted bottleneck: expand, depthwise, squeeze-and-excite, project; plus the input where shapes allow."""

    def __init__(
        self, c_in: int, c_out: int, kernel: int, stride: int, expansion: int, nominal: int, drop: float
    ) -> None:
        super().__init__()
        hidden, squeezed = c_in * expansion, max(1, c_in // 4)
        if expansion != 1:
            self._expand_conv = nn.Conv2d(c_in, hidden, 1, bias=False)
            self._bn0 = _batchnorm(hidden)
        self._depthwise_conv = SameConv2d(hidden, hidden, kernel, stride=stride, nominal=nominal, groups=hidden)
        self._bn1 = _batchnorm(hidden)
        self._se_reduce = nn.Conv2d(hidden, squeezed, 1)
        self._se_expand = nn.Conv2d(squeezed, hidden, 1)
        self._project_conv = nn.Conv2d(hidden, c_out, 1, bias=False)
        self._bn2 = _batchnorm(c_out)
        self.has_expansion = expansion != 1
        self.has_skip = stride == 1 and c_in == c_out
        self.drop = StochasticDepth(drop, "row")

    def forward(self, inputs: Tensor) -> Tensor:
        x = F.silu(self._bn0(self._expand_conv(inputs))) if self.has_expansion else inputs
        x = F.silu(self._bn1(self._depthwise_conv(x)))
        gate = self._se_expand(F.silu(self._se_reduce(x.mean(dim=(2, 3), keepdim=True))))
        x = self._bn2(self._project_conv(x * gate.sigmoid()))
        return self.drop(x) + inputs if self.has_skip else x


class SmallModelEfficientNet(nn.Module):
    """(B, 3, S, S) -> (B, 1000); what goes into `fc` are the (B, C) features: C is 1280, 1280, 1408, 1536."""

    def __init__(self, size: str) -> None:
        super().__init__()
        width, depth, nominal, dropout = SIZES[size]
        channels = make_divisible(32 * width, 8)
        self._conv_stem = SameConv2d(3, channels, 3, stride=2, nominal=nominal)
        self._bn0 = _batchnorm(channels)
        nominal = math.ceil(nominal / 2)
        total = sum(math.ceil(depth * repeats) for repeats, *_ in STAGES)
        blocks: list[nn.Module] = []
        for repeats, kernel, first_stride, expansion, stage_channels in STAGES:
            c_out = make_divisible(stage_channels * width, 8)
            for i in range(math.ceil(depth * repeats)):
                stride, drop = first_stride if i == 0 else 1, 0.2 * len(blocks) / total
                blocks.append(Block(channels, c_out, kernel, stride, expansion, nominal, drop))
                nominal, channels = math.ceil(nominal / stride), c_out
        self._blocks = nn.ModuleList(blocks)
        features = make_divisible(1280 * width, 8)
        self._conv_head = nn.Conv2d(channels, features, 1, bias=False)
        self._bn1 = _batchnorm(features)
        self._dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(features, 1000)

    def forward(self, images: Tensor) -> Tensor:
        x = F.silu(self._bn0(self._conv_stem(images)))
        for block in self._blocks:
            x = block(x)
        x = F.silu(self._bn1(self._conv_head(x)))
        return self.fc(self._dropout(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)))
