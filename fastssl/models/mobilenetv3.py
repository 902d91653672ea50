"""MobileNetV3-small and -large (Howard et al., arXiv 1905.02244) as in the small-model project (arXiv 2107.14762).

Weights trained there compute the same here, under the same names. What differs from torchvision's `mobilenet_v3_*`:
  - squeeze-and-excitation takes make_divisible(C // 4, 8) of the expanded channels, through Linear layers;
  - it comes before the block's second activation (convolution, BN, SE, activation), but after it in the one block
    whose expansion is 1;
  - BN has PyTorch's eps 1e-5 and momentum 0.1 (torchvision: 1e-3, 0.01);
  - the penultimate layer is Linear, h-swish, Dropout 0.2; the classifier is `fc`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models._utils import _make_divisible as make_divisible

# kernel, expansion, channels, squeeze-and-excitation, h-swish (else ReLU), stride
LARGE = (
    (3, 1, 16, False, False, 1),
    (3, 4, 24, False, False, 2),
    (3, 3, 24, False, False, 1),
    (5, 3, 40, True, False, 2),
    (5, 3, 40, True, False, 1),
    (5, 3, 40, True, False, 1),
    (3, 6, 80, False, True, 2),
    (3, 2.5, 80, False, True, 1),
    (3, 2.3, 80, False, True, 1),
    (3, 2.3, 80, False, True, 1),
    (3, 6, 112, True, True, 1),
    (3, 6, 112, True, True, 1),
    (5, 6, 160, True, True, 2),
    (5, 6, 160, True, True, 1),
    (5, 6, 160, True, True, 1),
)
SMALL = (
    (3, 1, 16, True, False, 2),
    (3, 4.5, 24, False, False, 2),
    (3, 3.67, 24, False, False, 1),
    (5, 4, 40, True, True, 2),
    (5, 6, 40, True, True, 1),
    (5, 6, 40, True, True, 1),
    (5, 3, 48, True, True, 1),
    (5, 3, 48, True, True, 1),
    (5, 6, 96, True, True, 2),
    (5, 6, 96, True, True, 1),
    (5, 6, 96, True, True, 1),
)


class SqueezeExcite(nn.Module):
    """Scales each channel of (B, C, H, W) by a gate in [0, 1] computed from the channels' means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = make_divisible(channels // 4, 8)
        self.fc = nn.Sequential(
            nn.Linear(channels, squeezed), nn.ReLU(), nn.Linear(squeezed, channels), nn.Hardsigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean(dim=(2, 3)))[:, :, None, None]


class Block(nn.Module):
    """Inverted residual: expand, depthwise, project; plus the input where shapes allow."""

    def __init__(self, c_in: int, hidden: int, c_out: int, kernel: int, stride: int, se: bool, hswish: bool) -> None:
        super().__init__()
        self.has_skip = stride == 1 and c_in == c_out
        excite = SqueezeExcite(hidden) if se else nn.Identity()
        depthwise = [*_conv_bn(hidden, hidden, kernel, stride, groups=hidden)]
        if c_in == hidden:
            layers = [*depthwise, _activation(hswish), excite]
        else:
            layers = [*_conv_bn(c_in, hidden), _activation(hswish), *depthwise, excite, _activation(hswish)]
        self.conv = nn.Sequential(*layers, *_conv_bn(hidden, c_out))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.has_skip else self.conv(x)


class SmallModelMobileNetV3(nn.Module):
    """(B, 3, S, S) -> (B, 1000); what goes into `fc` are the (B, 1024) or (B, 1280) features."""

    def __init__(self, table: tuple, feature_dim: int) -> None:
        super().__init__()
        channels = 16
        layers = [nn.Sequential(*_conv_bn(3, channels, 3, 2), nn.Hardswish())]
        for kernel, expansion, c_out, se, hswish, stride in table:
            hidden = make_divisible(channels * expansion, 8)
            layers.append(Block(channels, hidden, c_out, kernel, stride, se, hswish))
            channels = c_out
        self.features = nn.Sequential(*layers)
        self.conv = nn.Sequential(*_conv_bn(channels, hidden), nn.Hardswish())
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Linear(hidden, feature_dim), nn.Hardswish(), nn.Dropout(0.2))
        self.fc = nn.Linear(feature_dim, 1000)
        self.apply(initialise)

    def forward(self, images: Tensor) -> Tensor:
        x = self.avgpool(self.conv(self.features(images)))
        return self.fc(self.classifier(torch.flatten(x, 1)))


def mobilenetv3_small() -> SmallModelMobileNetV3:
    """The small-model project's MobileNetV3-small; features (B, 1024)."""
    return SmallModelMobileNetV3(SMALL, 1024)


def mobilenetv3_large() -> SmallModelMobileNetV3:
    """The small-model project's MobileNetV3-large; features (B, 1280)."""
    return SmallModelMobileNetV3(LARGE, 1280)


def _conv_bn(c_in: int, c_out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> tuple[nn.Module, nn.Module]:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(c_out)


def _activation(hswish: bool) -> nn.Module:
    return nn.Hardswish() if hswish else nn.ReLU()


def initialise(module: nn.Module) -> None:
    """The first weights of a convolution or a Linear layer; leaves others alone."""
    if isinstance(module, nn.Conv2d):  # fan-out that does not count groups
        height, width = module.kernel_size
        nn.init.normal_(module.weight, std=(2 / (height * width * module.out_channels)) ** 0.5)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)
