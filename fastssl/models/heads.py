"""Projection heads: encoder features (B, C) -> the space of the loss (B, D), not normalised.

`simple` is the two-layer head of MoCo v2 (Chen et al., arXiv 2003.04297); `wide`, `deep` and `dropout` are the ones
that help small encoders (Shi et al., arXiv 2107.14762). All are any-size: C comes from the encoder.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from torch import nn

_HEADS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": nn.Linear,
    "simple": lambda c, dim: nn.Sequential(nn.Linear(c, c), nn.ReLU(), nn.Linear(c, dim)),
    "deep": lambda c, dim: nn.Sequential(nn.Linear(c, c), nn.ReLU(), nn.Linear(c, c), nn.ReLU(), nn.Linear(c, dim)),
    "wide": lambda c, dim: nn.Sequential(nn.Linear(c, 2 * c), nn.ReLU(), nn.Linear(2 * c, dim)),
    "dropout": lambda c, dim: nn.Sequential(nn.Linear(c, c), nn.ReLU(), nn.Dropout(0.5), nn.Linear(c, dim)),
}


def list_heads() -> list[str]:
    """Names that `make_head` takes."""
    return list(_HEADS)


def make_head(name: str, feature_dim: int, dim: int) -> nn.Module:
    """A module (B, feature_dim) -> (B, dim), with PyTorch's default initialisation.

    Raises ValueError for an unknown name or a size below 1.
    """
    if name not in _HEADS:
        near = difflib.get_close_matches(name, _HEADS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(_HEADS)}"
        raise ValueError(f"unknown head {name!r}: {hint}")
    if feature_dim < 1 or dim < 1:
        raise ValueError(f"a head needs sizes of at least 1, got {feature_dim} features and dimension {dim}")
    return _HEADS[name](feature_dim, dim)
