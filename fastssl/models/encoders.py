"""Encoders by name: a backbone (images -> features) and a projection head (features -> z).

The backbone is a classifier whose last Linear layer has been replaced by an Identity, so its `state_dict()` is the
classifier's own without that layer, and checkpoints of classifiers load strictly into it. To add an architecture, add
a function that builds the classifier to `_ARCHITECTURES`.

A name means what the command lines of the small-model project (arXiv 2107.14762) mean by it: `mobilenetv3_small`,
`efficientnet_b0` to `_b3` and `vit_tiny` are that project's own variants, torchvision's are `mobilenet_v3_small` and
`tv_efficientnet_b0` to `_b3`. Any model of timm can be had as `timm:NAME`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torchvision.models as tv
from torch import Tensor, nn

from fastssl.models.efficientnet import SIZES, SmallModelEfficientNet
from fastssl.models.heads import make_head
from fastssl.models.mobilenetv3 import SmallModelMobileNetV3, initialise, mobilenetv3_large, mobilenetv3_small
from fastssl.models.resnets import WidenedResNet, resnext152_32x8d
from fastssl.models.tryout import build_without_memory
from fastssl.models.vit import SmallModelViT

# Auxiliary classifiers would make their output a tuple in training.
_TORCHVISION_OPTIONS = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}
# SqueezeNet classifies with a convolution: it has no last Linear to replace.
_WITHOUT_LINEAR = {"squeezenet1_0", "squeezenet1_1"}


class Architecture(NamedTuple):
    """A function that builds a classifier, and the project whose definition it follows."""

    build: Callable[[], nn.Module]
    source: str  # torchvision, timm or small models


def _build_timm(name: str, **options: object) -> nn.Module:
    import timm  # takes seconds

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f"did you mean timm:{near[0]}?" if near else "timm.list_models() lists all"
        raise ValueError(f"timm has no model {name!r}: {hint}")
    # num_classes, since some have no classifier by default
    return timm.create_model(name, pretrained=False, num_classes=1000, **options)


def _torchvision(name: str) -> Architecture:
    return Architecture(partial(tv.get_model, name, weights=None, **_TORCHVISION_OPTIONS.get(name, {})), "torchvision")


_SMALL_EFFICIENTNETS = {f"efficientnet_{size}": partial(SmallModelEfficientNet, size) for size in SIZES}
_SMALL_MODELS = {
    "mobilenetv3_small": mobilenetv3_small,
    "mobilenetv3_large": mobilenetv3_large,
    "vit_tiny": SmallModelViT,
    "resnext152_32x8d": resnext152_32x8d,
    "swav_resnet50": tv.resnet50,  # these two are torchvision's network; only the names of their heads differ
    "simclr_resnet50": tv.resnet50,
    **{f"swav_resnet50w{widen}": partial(WidenedResNet, widen) for widen in (2, 4, 5)},
    **_SMALL_EFFICIENTNETS,
}
_TIMM = {
    "deit_tiny": partial(_build_timm, "deit_tiny_patch16_224", dynamic_img_size=True),  # any multiple of 16 pixels
    "vit_base": partial(_build_timm, "vit_base_patch16_224", dynamic_img_size=True),
    # MoCo v3's own (arXiv 2104.02057): 12 heads, where timm's and DINO's have 6
    "mocov3_vit_small": partial(_build_timm, "vit_small_patch16_224", num_heads=12, dynamic_img_size=True),
    **{f"tf_efficientnet_{size}": partial(_build_timm, f"tf_efficientnet_{size}") for size in SIZES},
}
_ARCHITECTURES: dict[str, Architecture] = {
    **{
        ("tv_" if name in _SMALL_EFFICIENTNETS else "") + name: _torchvision(name)
        for name in tv.list_models(module=tv)
        if name not in _WITHOUT_LINEAR
    },
    **{name: Architecture(build, "small models") for name, build in _SMALL_MODELS.items()},
    **{name: Architecture(build, "timm") for name, build in _TIMM.items()},
}

# For each family that can have a CIFAR stem: the stem's convolution, and the pooling after it, if there is one.
_STEMS: dict[type[nn.Module], tuple[str, str | None]] = {
    tv.ResNet: ("conv1", "maxpool"),
    WidenedResNet: ("conv1", "maxpool"),
    SmallModelMobileNetV3: ("features.0.0", None),
    SmallModelEfficientNet: ("_conv_stem", None),
    tv.DenseNet: ("features.conv0", "features.pool0"),
    tv.ShuffleNetV2: ("conv1.0", "maxpool"),
    tv.MobileNetV2: ("features.0.0", None),
    tv.MobileNetV3: ("features.0.0", None),
    tv.EfficientNet: ("features.0.0", None),
    tv.MNASNet: ("layers.0", None),
    tv.RegNet: ("stem.0", None),
}


class Encoder(nn.Module):
    """`head(backbone(images))`: (B, 3, S, S) normalised images -> (B, D) projections z, not normalised.

    `backbone` gives the (B, feature_dim) features that evaluation and export use.
    """

    def __init__(self, backbone: nn.Module, feature_dim: int, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.feature_dim = feature_dim
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


def list_architectures() -> list[str]:
    """The names that `make_encoder` knows, sorted. It also takes any timm:NAME."""
    return sorted(_ARCHITECTURES)


def source_of(arch: str) -> str:
    """The project whose definition an architecture of the list follows: torchvision, timm or small models."""
    return _ARCHITECTURES[arch].source


def make_encoder(arch: str, *, head: str = "linear", dim: int = 128, stem: str = "imagenet") -> Encoder:
    """A randomly initialised encoder: architecture, projection head (see `heads`) and stem by name.

    stem="cifar" is for images of 32 pixels: the first convolution is 3x3 with stride 1 and no pooling follows (He et
    al., arXiv 1512.03385, section 4.2), so the first stage keeps the full resolution.

    Raises ValueError for an unknown architecture, head or stem, and for a family without a CIFAR stem.
    """
    backbone, _, feature_dim = make_backbone(arch, stem)
    layers = make_head(head, feature_dim, dim)
    if isinstance(backbone, SmallModelMobileNetV3) and head != "wide":  # there the network's classifier ends the head
        initialise([layer for layer in layers.modules() if isinstance(layer, nn.Linear)][-1])
    return Encoder(backbone, feature_dim, layers)


def make_backbone(arch: str, stem: str = "imagenet") -> tuple[nn.Module, str, int]:
    """(randomly initialised backbone, name of the classifier's last layer, which it lacks, number of features)."""
    backbone = make_classifier(arch)
    name, linear = find_classifier(backbone)
    backbone.set_submodule(name, nn.Identity())
    if stem == "cifar":
        _set_cifar_stem(backbone, arch)
    elif stem != "imagenet":
        raise ValueError(f"unknown stem {stem!r}: choose imagenet or cifar")
    return backbone, name, linear.in_features


def make_classifier(arch: str) -> nn.Module:
    """The classifier of an architecture, randomly initialised. Raises ValueError for an unknown name."""
    if arch.startswith("timm:"):
        return _build_timm(arch.removeprefix("timm:"))
    if arch in _WITHOUT_LINEAR:
        raise ValueError(f"{arch} has no last Linear layer, whose input are the features: choose another architecture")
    if arch not in _ARCHITECTURES:
        near = difflib.get_close_matches(arch, _ARCHITECTURES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`fastssl models` lists all"
        raise ValueError(f"unknown architecture {arch!r}: {hint}")
    return _ARCHITECTURES[arch].build()


@cache
def classifier_name(arch: str) -> str:
    """The name of the classifier's last layer in an architecture: `fc`, `classifier.3`, ..."""
    return find_classifier(build_without_memory(lambda: make_classifier(arch)))[0]


def find_classifier(model: nn.Module) -> tuple[str, nn.Linear]:
    """(name, layer) of a classifier's last Linear layer, whose input are the features."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if hasattr(model, "get_classifier"):  # a timm model knows its classifier, which need not be the last Linear layer
        own = model.get_classifier()
        linears = {name: module for name, module in linears.items() if module is own}
    if not linears:
        raise ValueError(f"{type(model).__name__} does not end in a Linear layer: choose another architecture")
    return list(linears.items())[-1]


def _set_cifar_stem(backbone: nn.Module, arch: str) -> None:
    if type(backbone) not in _STEMS:
        raise ValueError(f"{arch} has no CIFAR stem: use --stem imagenet, or a ResNet, MobileNet or EfficientNet")
    conv_name, pool_name = _STEMS[type(backbone)]
    old = backbone.get_submodule(conv_name)
    if old.kernel_size == (3, 3):
        old.stride = (1, 1)
    else:
        conv = nn.Conv2d(old.in_channels, old.out_channels, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        backbone.set_submodule(conv_name, conv)
    if pool_name is not None:
        backbone.set_submodule(pool_name, nn.Identity())
