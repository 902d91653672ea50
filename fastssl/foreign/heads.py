"""The projection heads and classifiers of checkpoints, recognised by the names and shapes of their tensors."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn.functional import normalize

from fastssl.models.heads import list_heads, make_head
from fastssl.models.tryout import build_without_memory

_OTHERS = ("simclr", "normalised linear")


class Normalise(nn.Module):
    """Scales rows (B, C) to unit length."""

    def forward(self, x: Tensor) -> Tensor:
        return normalize(x, dim=1)


def recognise_head(tensors: dict[str, Tensor], feature_dim: int) -> tuple[str, int | None]:
    """(name, output dimension) of a head: a name for `build_head`, or ("none", None) where there are no tensors, or
    ("unknown", None).
    """
    if not tensors:
        return "none", None
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if linears := [name for name, shape in found.items() if len(shape) == 2]:
        dim = found[max(linears)][0]  # of the last by name: a file may hold them in any order
        for head in (*list_heads(), *_OTHERS):
            built = build_without_memory(partial(build_head, head, feature_dim, dim))
            if {name: tensor.shape for name, tensor in built.state_dict().items()} == found:
                return head, dim
    return "unknown", None


def build_head(name: str, feature_dim: int, dim: int) -> nn.Module:
    """A head with random weights: one of `models.heads`, simclr (with batch norm) or what transfer trains."""
    if name == "normalised linear":
        return nn.Sequential(Normalise(), nn.Linear(feature_dim, dim))
    if name == "simclr":
        hidden = nn.Linear(feature_dim, feature_dim)
        return nn.Sequential(hidden, nn.BatchNorm1d(feature_dim), nn.ReLU(), nn.Linear(feature_dim, dim))
    return make_head(name, feature_dim, dim)
