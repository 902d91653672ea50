"""The projection heads and classifiers of checkpoints, recognised by the positions and shapes of their layers."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import normalize

from fastssl.models.heads import make_head


class Normalise(nn.Module):
    """Scales rows (B, C) to unit length."""

    def forward(self, x: Tensor) -> Tensor:
        return normalize(x, dim=1)


def name_head(tensors: dict[str, Tensor], feature_dim: int) -> str | None:
    """The name of a head: one of `models.heads`, or "simclr" (with batch norm), "normalised linear" (what transfer
    trains) or "none" (no tensors). Returns None for a head that is not one of these.
    """
    if not tensors:
        return "none"
    weights = {k.removesuffix("weight").rstrip("."): v for k, v in tensors.items() if k.endswith("weight")}
    linears = tuple(sorted(k for k, v in weights.items() if v.ndim == 2))
    first = weights[linears[0]] if linears else None
    if first is None or first.shape[1] != feature_dim:
        return None
    hidden = first.shape[0] / feature_dim
    names = {
        ("",): "linear",
        ("1",): "normalised linear",
        ("0", "2"): {1: "simple", 2: "wide"}.get(hidden),
        ("0", "3"): "simclr" if "1.running_mean" in tensors else "dropout",
        ("0", "2", "4"): "deep",
    }
    name = names.get(linears)
    if name is None:
        return None
    expected = build_head(name, feature_dim, weights[linears[-1]].shape[0]).state_dict()
    found = {k: v.shape for k, v in tensors.items()}
    return name if found == {k: v.shape for k, v in expected.items()} else None


def build_head(name: str, feature_dim: int, dim: int) -> nn.Module:
    """A head, by a name from `name_head`, with random weights."""
    if name == "normalised linear":
        return nn.Sequential(Normalise(), nn.Linear(feature_dim, dim))
    if name == "simclr":
        hidden = nn.Linear(feature_dim, feature_dim)
        return nn.Sequential(hidden, nn.BatchNorm1d(feature_dim), nn.ReLU(), nn.Linear(feature_dim, dim))
    return make_head(name, feature_dim, dim)


def output_dim(tensors: dict[str, Tensor]) -> int:
    """The output dimension of a head: that of its last Linear layer, by name, whatever the order of the file."""
    return tensors[max(name for name, v in tensors.items() if v.ndim == 2)].shape[0]
