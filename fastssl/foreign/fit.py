"""Which architecture a set of weights belongs to: by the names and shapes of its tensors."""

from __future__ import annotations

from functools import cache, partial
from typing import NamedTuple

from torch import Tensor

from fastssl.foreign.layout import Layout, split_classifier
from fastssl.models.encoders import list_architectures, make_backbone
from fastssl.models.tryout import build_without_memory

# The same network under another name: the first is what is said.
_ALIASES = {"swav_resnet50": "resnet50", "simclr_resnet50": "resnet50"}
# Batches seen by BN; files written before PyTorch 0.4.1 lack it, and nothing reads it here.
COUNTER = "num_batches_tracked"


class Signature(NamedTuple):
    """Names and shapes of a backbone's tensors, and where its classifier stands."""

    classifier: str
    feature_dim: int
    shapes: dict[str, tuple[int, ...]]


@cache
def signature(arch: str, stem: str = "imagenet") -> Signature | None:
    """Of an architecture, without allocating it. None where its stem cannot be had."""
    try:
        backbone, classifier, feature_dim = build_without_memory(partial(make_backbone, arch, stem))
    except ValueError:
        return None
    shapes = {name: tuple(tensor.shape) for name, tensor in backbone.state_dict().items()}
    return Signature(classifier, feature_dim, shapes)


def differences(backbone: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """What keeps these weights from fitting, in the order of the layers; empty when they fit."""
    found = []
    for name, shape in shapes.items():
        if name not in backbone:
            if not name.endswith(COUNTER):
                found.append(f"{name} is missing")
        elif tuple(backbone[name].shape) != shape:
            found.append(f"{name} has shape {tuple(backbone[name].shape)}, not {shape}")
    return found + [f"{name} is unexpected" for name in backbone if name not in shapes]


def fits(layout: Layout, arch: str, stem: str) -> bool:
    """Do these weights, head aside, belong to this architecture?"""
    own = signature(arch, stem)
    return own is not None and not differences(split_classifier(layout, own.classifier).backbone, own.shapes)


def fitting_architectures(layout: Layout) -> list[tuple[str, str]]:
    """(architecture, stem) of all known ones that fit; the CIFAR stem only where names and shapes tell it apart."""
    found = [(arch, "imagenet") for arch in list_architectures() if arch not in _ALIASES and _may_fit(layout, arch)]
    found = [pair for pair in found if fits(layout, *pair)]
    if found:
        return found
    families = [arch for arch in list_architectures() if arch not in _ALIASES and _may_fit(layout, arch)]
    return [(arch, "cifar") for arch in families if fits(layout, arch, "cifar")]


def _may_fit(layout: Layout, arch: str) -> bool:
    """A quick no: the count of tensors, head aside, is another."""
    own = signature(arch)
    if own is None:
        return False
    names = split_classifier(layout, own.classifier).backbone
    return sum(not k.endswith(COUNTER) for k in own.shapes) == sum(not k.endswith(COUNTER) for k in names)
