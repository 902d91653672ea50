"""ResNets that torchvision lacks: ResNet-50 with every stage widened, and ResNeXt-152."""

from __future__ import annotations

import torchvision.models as tv
from torch import nn
from torchvision.models.resnet import Bottleneck


class WidenedResNet(tv.ResNet):
    """ResNet-50 whose stem and stages are `widen` times as wide, as SwAV's (Caron et al., arXiv 2006.09882).

    Unlike in torchvision's wide_resnet50_2, which widens only the 3x3 convolutions, there are more features, too:
    (B, 2048 * widen). (SwAV's code pads the first convolution in two steps, with the same result.)
    """

    def __init__(self, widen: int) -> None:
        self.widen = widen
        super().__init__(Bottleneck, [3, 4, 6, 3])
        self.conv1 = nn.Conv2d(3, 64 * widen, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.fc = nn.Linear(2048 * widen, 1000)

    def _make_layer(self, block, planes: int, *args, **kwargs) -> nn.Sequential:
        if planes == 64:  # the first stage comes after the stem
            self.inplanes = 64 * self.widen
        return super()._make_layer(block, planes * self.widen, *args, **kwargs)


def resnext152_32x8d() -> tv.ResNet:
    """ResNeXt-152 32x8d; features (B, 2048)."""
    return tv.ResNet(Bottleneck, [3, 8, 36, 3], groups=32, width_per_group=8)
