"""Finds the architecture that a set of weights belongs to, by the names and shapes of its tensors."""

from __future__ import annotations

from functools import cache, partial
from typing import NamedTuple

from torch import Tensor

from fastssl.foreign.layout import Layout, split_classifier
from fastssl.models.encoders import list_architectures, make_backbone
from fastssl.models.tryout import build_without_memory, first_weights

# Other names of a network of torchvision's, which are not reported as another one that fits.
ALIASES = {"swav_resnet50": "resnet50", "simclr_resnet50": "resnet50"}
# The number of batches that a batch norm has seen: files from before PyTorch 0.4.1 lack it, and nothing here reads it.
COUNTER = "num_batches_tracked"


class Signature(NamedTuple):
    """Names and shapes of a backbone's tensors, and the name of its classifier."""

    classifier: str
    feature_dim: int
    shapes: dict[str, tuple[int, ...]]


@cache
def signature(arch: str, stem: str = "imagenet") -> Signature | None:
    """The signature of an architecture, found without allocating its weights; None if it does not have this stem."""
    try:
        backbone, classifier, feature_dim = build_without_memory(partial(make_backbone, arch, stem))
    except ValueError:
        return None
    shapes = {name: tuple(tensor.shape) for name, tensor in backbone.state_dict().items()}
    return Signature(classifier, feature_dim, shapes)


@cache
def _first_weights(arch: str) -> set[tuple[int, ...]]:
    return first_weights(partial(make_backbone, arch), 20)


def differences(backbone: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Why these weights do not fit: a phrase for each tensor, in the order of the layers; empty when they fit."""
    found = []
    for name, shape in shapes.items():
        if name not in backbone:
            if not name.endswith(COUNTER):
                found.append(f"{name} is missing")
        elif tuple(backbone[name].shape) != shape:
            found.append(f"{name} has shape {tuple(backbone[name].shape)}, not {shape}")
    return found + [f"{name} is unexpected" for name in backbone if name not in shapes]


def few(names: list[str]) -> str:
    """The first of many names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def fits(layout: Layout, arch: str, stem: str) -> bool:
    """Whether these weights, without the head, belong to this architecture."""
    own = signature(arch, stem)
    return own is not None and not differences(split_classifier(layout, own.classifier).backbone, own.shapes)


def fitting_architectures(layout: Layout, stem: str | None = None) -> list[tuple[str, str]]:
    """All known (architecture, stem) that fit. Unless given, the stem is CIFAR's only if none fits with ImageNet's."""
    candidates = [arch for arch in list_architectures() if arch not in ALIASES and _may_fit(layout, arch)]
    for choice in (stem,) if stem else ("imagenet", "cifar"):
        found = [(arch, choice) for arch in candidates if fits(layout, arch, choice)]
        if found:
            return found
    return []


def _may_fit(layout: Layout, arch: str) -> bool:
    """Whether it has the first weights, but for a stem's, and the right number of tensors, without the head.

    Both are quicker to tell than names and shapes.
    """
    if len(_first_weights(arch) - {tuple(tensor.shape) for tensor in layout.backbone.values()}) > 2:
        return False
    own = signature(arch)
    names = split_classifier(layout, own.classifier).backbone
    return sum(not k.endswith(COUNTER) for k in own.shapes) == sum(not k.endswith(COUNTER) for k in names)
