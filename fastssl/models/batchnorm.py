"""Batch normalisation over part of the batch (split, one device) or over all ranks (SyncBN).

MoCo wants keys and queries normalised by different statistics, or the task leaks through them (He et al., arXiv
1911.05722, section 3.3). Several GPUs give that by themselves; on one device `split_batchnorm` makes s groups out of
the batch, as if s devices held a share each.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class _SplitForward:
    """Training forward of `splits` contiguous sub-batches, each normalised by its own mean and variance."""

    splits: int

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.splits == 1:
            return super().forward(x)
        self._check_input_dim(x)
        if x.shape[0] % self.splits:
            raise ValueError(f"a batch of {x.shape[0]} cannot be split into {self.splits} equal parts (--bn-splits)")
        if x.numel() == self.splits * x.shape[1]:
            raise ValueError("one value a channel has no variance: take fewer --bn-splits or a larger --batch-size")
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if torch.compiler.is_compiling():
            return self._normalise_together(x)
        parts = x.chunk(self.splits)
        return torch.cat([self._normalise(part, i) for i, part in enumerate(parts)])

    def _normalise_together(self, x: Tensor) -> Tensor:
        # For compilers: they fuse these into the two passes of a batch norm, but drown in `splits` of them and a cat.
        parts = x.unflatten(0, (self.splits, -1)).transpose(0, 1).flatten(1, 2)  # (B/s, s C, ...)
        weight, bias = (t if t is None else t.repeat(self.splits) for t in (self.weight, self.bias))
        mean, var = (t if t is None else t.repeat(self.splits) for t in (self.running_mean, self.running_var))
        y = F.batch_norm(parts, mean, var, weight, bias, True, self.momentum, self.eps)
        if mean is not None:
            self.running_mean.copy_(mean.view(self.splits, -1).mean(0))
            self.running_var.copy_(var.view(self.splits, -1).mean(0))
        return y.unflatten(1, (self.splits, -1)).transpose(0, 1).flatten(0, 1)

    def _normalise(self, part: Tensor, i: int) -> Tensor:
        # With these factors the updates in a row leave (1-m) running + m mean(statistics): every part weighs m/s.
        factor = self.momentum / (self.splits - (self.splits - 1 - i) * self.momentum)
        return F.batch_norm(part, self.running_mean, self.running_var, self.weight, self.bias, True, factor, self.eps)


class SplitBatchNorm1d(_SplitForward, nn.BatchNorm1d):
    """BatchNorm1d over (B/splits, C) or (B/splits, C, L) sub-batches; eval mode and state_dict are BatchNorm1d's."""


class SplitBatchNorm2d(_SplitForward, nn.BatchNorm2d):
    """BatchNorm2d over (B/splits, C, H, W) sub-batches; eval mode and state_dict are BatchNorm2d's."""


class _SplitActForward(_SplitForward):
    """The same for timm's BatchNormAct2d, whose activation (and dropout) belong to the layer."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return self.act(self.drop(y)) if self.training and self.splits > 1 else y


_SPLIT_TYPES = {
    nn.BatchNorm1d: SplitBatchNorm1d,
    nn.BatchNorm2d: SplitBatchNorm2d,
}


@cache
def _split_type(kind: type[_BatchNorm]) -> type[_BatchNorm] | None:
    """The split layer that stands in for layers of exactly this type; None where there is none."""
    if issubclass(kind, _SplitForward):
        return kind
    if _is_timm_act(kind) and kind.__name__ == "BatchNormAct2d":  # made here: importing timm takes seconds
        return type("SplitBatchNormAct2d", (_SplitActForward, kind), {})
    return _SPLIT_TYPES.get(kind)


def _is_timm_act(kind: type) -> bool:
    return kind.__module__ == "timm.layers.norm_act"


def split_batchnorm(module: nn.Module, splits: int) -> None:
    """Makes every BatchNorm1d/2d of `module` normalise `splits` contiguous sub-batches apart, in place.

    One training forward moves the running statistics by the mean of the sub-batches' (unbiased variance) and counts
    as one batch, so they are what the mean over `splits` separate devices would be. Parameters, buffers and their
    names stay: checkpoints do not know about it, and splits=1 is plain batch normalisation again. A training batch
    that `splits` does not divide is a ValueError.

    Raises ValueError when splits < 1, when there is nothing to split, or for a layer that cannot be split.
    """
    if splits < 1:
        raise ValueError(f"batch normalisation needs at least 1 split, got {splits}")
    layers = _batchnorm_layers(module)
    if splits == 1:
        for layer in layers.values():
            if isinstance(layer, _SplitForward):
                layer.splits = 1
        return
    if not layers:
        raise ValueError(f"this model has no batch normalisation to split: leave out --bn-splits {splits}")
    for name, layer in layers.items():
        if _split_type(type(layer)) is None:
            raise ValueError(f"cannot split the {type(layer).__name__} layer {name!r}: use --bn-splits 1")
        if layer.momentum is None:
            raise ValueError(f"cannot split layer {name!r}: its momentum is None (cumulative average), set a number")
    for layer in layers.values():
        # The same object with another forward: optimizers, hooks and names that refer to it stay valid.
        layer.__class__ = _split_type(type(layer))
        layer.splits = splits


def check_sync_batchnorm(device: torch.device) -> None:
    """Raises ValueError where torch has no SyncBatchNorm (everywhere but CUDA)."""
    if device.type != "cuda":
        raise ValueError(f"SyncBatchNorm needs CUDA and this run is on {device.type}: leave it out, or use --bn-splits")


def convert_sync_batchnorm(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` with every BatchNorm replaced by SyncBatchNorm (statistics over all ranks), for training on `device`.

    Raises ValueError when `device` is not CUDA, and when a layer has been split (a layer is one or the other).
    """
    check_sync_batchnorm(device)
    layers = list(_batchnorm_layers(module).values())
    if any(isinstance(layer, _SplitForward) and layer.splits > 1 for layer in layers):
        raise ValueError("batch normalisation is either split or synchronised: choose --bn-splits or SyncBatchNorm")
    if any(_is_timm_act(kind) for layer in layers for kind in type(layer).__mro__):
        from timm.layers import convert_sync_batchnorm as convert_with_activations  # torch's would drop them

        return convert_with_activations(module)
    return nn.SyncBatchNorm.convert_sync_batchnorm(module)


def take_counters(module: nn.Module) -> list[Tensor]:
    """The `num_batches_tracked` of all layers, which count no more: whoever takes them counts for them.

    A network of 50 layers launches 50 kernels to add 1 to 50 numbers; one `torch._foreach_add_` does it too. The
    state_dict stays as it is. Layers whose momentum is None count for themselves, since they use the number.
    """
    layers = [m for m in _batchnorm_layers(module).values() if m.momentum is not None]
    layers = [m for m in layers if m.num_batches_tracked is not None]
    counters = [m.num_batches_tracked for m in layers]
    for layer in layers:
        layer.__dict__["num_batches_tracked"] = None  # forward looks here first, and finds nothing to count
    return counters


def _batchnorm_layers(module: nn.Module) -> dict[str, _BatchNorm]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)}
