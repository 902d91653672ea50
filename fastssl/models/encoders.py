"""Encoders by name: a backbone (images -> features) and a projection head (features -> z).

The backbone is a classifier whose last Linear layer has become an Identity, everything before it untouched, so its
`state_dict()` is the classifier's own without that layer, and a checkpoint of one loads strictly into the other.
A further family is one more entry of `_ARCHITECTURES`: a function that builds the classifier.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial

import torchvision.models as tv
from torch import Tensor, nn

from fastssl.models.heads import make_head

# Their auxiliary classifiers make the output a tuple while training.
_TORCHVISION_OPTIONS = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}
# SqueezeNet classifies with a convolution: it has no last Linear to replace.
_WITHOUT_LINEAR = {"squeezenet1_0", "squeezenet1_1"}

_ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    name: partial(tv.get_model, name, weights=None, **_TORCHVISION_OPTIONS.get(name, {}))
    for name in tv.list_models(module=tv)
    if name not in _WITHOUT_LINEAR
}

# The stem's convolution, and the pooling after it where the family has one.
_STEMS: dict[type[nn.Module], tuple[str, str | None]] = {
    tv.ResNet: ("conv1", "maxpool"),
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
    """Names that `make_encoder` takes, sorted."""
    return sorted(_ARCHITECTURES)


def make_encoder(arch: str, *, head: str = "linear", dim: int = 128, stem: str = "imagenet") -> Encoder:
    """A randomly initialised encoder: architecture, projection head (see `heads`) and stem by name.

    `stem="cifar"` suits 32-pixel images: a 3x3 first convolution of stride 1 and no pooling after it (the ResNet of
    He et al., arXiv 1512.03385, section 4.2), so the first stage keeps the full resolution.

    Raises ValueError for an unknown architecture, head or stem, and for a family without a CIFAR stem.
    """
    backbone = _make_classifier(arch)
    name, linear = _find_last_linear(backbone)
    backbone.set_submodule(name, nn.Identity())
    if stem == "cifar":
        _set_cifar_stem(backbone, arch)
    elif stem != "imagenet":
        raise ValueError(f"unknown stem {stem!r}: choose imagenet or cifar")
    return Encoder(backbone, linear.in_features, make_head(head, linear.in_features, dim))


def _make_classifier(arch: str) -> nn.Module:
    if arch not in _ARCHITECTURES:
        near = difflib.get_close_matches(arch, _ARCHITECTURES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "fastssl.models.list_architectures() names those known"
        raise ValueError(f"unknown architecture {arch!r}: {hint}")
    return _ARCHITECTURES[arch]()


def _find_last_linear(classifier: nn.Module) -> tuple[str, nn.Linear]:
    linears = [(name, module) for name, module in classifier.named_modules() if isinstance(module, nn.Linear)]
    assert linears, f"{type(classifier).__name__} has no Linear layer to replace"
    return linears[-1]


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
