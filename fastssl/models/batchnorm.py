"""Batch normalisation over part of the batch (split, one device) or over all ranks (SyncBN).

MoCo needs queries and keys normalised by different statistics, which would otherwise leak the answer (He et al., arXiv
1911.05722, section 3.3). On several GPUs they are; on a single device, `split_batchnorm` splits the batch into parts
and normalises each by itself, as if it were on a device of its own.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class _SplitForward:
    """In training, normalises `splits` contiguous sub-batches, each by its own mean and variance."""

    splits: int

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.splits == 1:
            return super().forward(x)
        self._check_input_dim(x)
        if x.shape[0] % self.splits:
            raise ValueError(f"a batch of {x.shape[0]} cannot be split into {self.splits} equal parts (--bn-splits)")
        if x.numel() == self.splits * x.shape[1]:
            raise ValueError(
                "a single value per channel has no variance: use fewer --bn-splits or a larger --batch-size"
            )
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if torch.compiler.is_compiling():
            return self._normalise_together(x)
        parts = x.chunk(self.splits)
        return torch.cat([self._normalise(part, i) for i, part in enumerate(parts)])

    def _normalise_together(self, x: Tensor) -> Tensor:
        # For torch.compile, which does badly with `splits` batch norms. The parts are a view of x in any memory format,
        # so that each pass reads and writes them in the order in which they lie. They are cast after the split: before
        # it, torch.compile writes some gradients in float32 first.
        parts = x.unflatten(0, (self.splits, -1)).to(torch.promote_types(x.dtype, torch.float32))  # (s, B/s, C, ...)
        with torch.no_grad():
            mean, rstd = self._take_statistics(parts)
        per_channel = mean.shape[2:]  # (C, 1, ...)
        weight = mean.new_ones(per_channel) if self.weight is None else self.weight.view(per_channel)
        bias = mean.new_zeros(per_channel) if self.bias is None else self.bias.view(per_channel)
        return _NormaliseParts.apply(parts, mean, rstd, weight, bias).to(x.dtype).flatten(0, 1)

    def _take_statistics(self, parts: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and 1 / standard deviation of each part and channel, (s, 1, C, 1, ...); updates the running ones."""
        var, mean = torch.var_mean(parts, _all_but_part_and_channel(parts), correction=0, keepdim=True)
        if self.running_mean is not None:
            values = parts.numel() // mean.numel()  # of a channel in a part
            self.running_mean.lerp_(mean.mean(0).flatten(), self.momentum)
            self.running_var.lerp_(var.mean(0).flatten() * (values / (values - 1)), self.momentum)
        return mean, (var + self.eps).rsqrt()

    def _normalise(self, part: Tensor, i: int) -> Tensor:
        # These factors make the successive updates add up to (1-m) running + m mean(statistics): each part weighs m/s.
        factor = self.momentum / (self.splits - (self.splits - 1 - i) * self.momentum)
        return F.batch_norm(part, self.running_mean, self.running_var, self.weight, self.bias, True, factor, self.eps)


class _NormaliseParts(torch.autograd.Function):
    """Parts (s, B/s, C, ...) normalised by statistics (s, 1, C, 1, ...) that are their own, then scaled by channel.

    The gradient is batch norm's, which depends on two sums. torch.compile would derive the same from the operations
    that compute the statistics, in more passes over the images. All dtypes are the same: in torch 2.11, a conversion
    in here that changes nothing loses the gradient.
    """

    @staticmethod
    def forward(ctx, parts: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(parts, mean, rstd, weight)
        return (parts - mean) * (rstd * weight) + bias

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        parts, mean, rstd, weight = ctx.saved_tensors
        normalised, dims = (parts - mean) * rstd, _all_but_part_and_channel(parts)
        grad_bias = grad.sum(dims, keepdim=True)
        grad_weight = (grad * normalised).sum(dims, keepdim=True)
        values = parts.numel() // mean.numel()
        grad_parts = (grad - (grad_bias + normalised * grad_weight) / values) * (rstd * weight)
        return grad_parts, None, None, grad_weight.sum((0, 1)), grad_bias.sum((0, 1))


def _all_but_part_and_channel(parts: Tensor) -> tuple[int, ...]:
    return (1, *range(3, parts.ndim))


class SplitBatchNorm1d(_SplitForward, nn.BatchNorm1d):
    """BatchNorm1d over (B/splits, C) or (B/splits, C, L) sub-batches; eval mode and state_dict are BatchNorm1d's."""


class SplitBatchNorm2d(_SplitForward, nn.BatchNorm2d):
    """BatchNorm2d over (B/splits, C, H, W) sub-batches; eval mode and state_dict are BatchNorm2d's."""


class _SplitActForward(_SplitForward):
    """The same for timm's BatchNormAct2d, a layer that includes the activation (and dropout)."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return self.act(self.drop(y)) if self.training and self.splits > 1 else y


_SPLIT_TYPES = {
    nn.BatchNorm1d: SplitBatchNorm1d,
    nn.BatchNorm2d: SplitBatchNorm2d,
}


@cache
def _split_type(kind: type[_BatchNorm]) -> type[_BatchNorm] | None:
    """The split layer that replaces layers of exactly this type; None if there is none."""
    if issubclass(kind, _SplitForward):
        return kind
    if _is_timm_act(kind) and kind.__name__ == "BatchNormAct2d":  # made on demand, since importing timm takes seconds
        return type("SplitBatchNormAct2d", (_SplitActForward, kind), {})
    return _SPLIT_TYPES.get(kind)


def _is_timm_act(kind: type) -> bool:
    return kind.__module__ == "timm.layers.norm_act"


def split_batchnorm(module: nn.Module, splits: int) -> None:
    """Makes every BatchNorm1d/2d of `module` normalise `splits` contiguous sub-batches separately, in place.

    A training forward counts as one batch and updates the running statistics with the mean of the sub-batches'
    statistics (unbiased variance), so they equal the mean over `splits` devices. Parameters, buffers and their names
    stay, so checkpoints are not affected; splits=1 restores plain batch normalisation.

    Raises ValueError when splits < 1, when there is nothing to split, or for a layer that cannot be split; later, in
    training, for a batch that `splits` does not divide.
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
            raise ValueError(f"cannot split layer {name!r}, whose momentum is None: set it to a number")
    for layer in layers.values():
        # The same object with another forward, so that optimizers, hooks and names that refer to it stay valid.
        layer.__class__ = _split_type(type(layer))
        layer.splits = splits


def convert_sync_batchnorm(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` with every BatchNorm replaced by SyncBatchNorm (statistics over all ranks), for training on `device`.

    Raises ValueError when `device` is not CUDA, or when a layer has been split.
    """
    if device.type != "cuda":
        raise ValueError(f"SyncBatchNorm needs CUDA, but this run is on {device.type}: leave it out or use --bn-splits")
    layers = list(_batchnorm_layers(module).values())
    if any(isinstance(layer, _SplitForward) and layer.splits > 1 for layer in layers):
        raise ValueError("batch normalisation is either split or synchronised: choose --bn-splits or SyncBatchNorm")
    if any(_is_timm_act(kind) for layer in layers for kind in type(layer).__mro__):
        from timm.layers import convert_sync_batchnorm as convert_with_activations  # torch's would drop them

        return convert_with_activations(module)
    return nn.SyncBatchNorm.convert_sync_batchnorm(module)


def take_counters(module: nn.Module) -> list[Tensor]:
    """Returns the `num_batches_tracked` of all layers and stops the layers from counting: the caller does it instead.

    A network of 50 layers would launch 50 kernels to add 1 to 50 numbers, which one `torch._foreach_add_` does as well.
    The state_dict stays as it is. Layers whose momentum is None still count, since they use the number, and so do those
    of SyncBatchNorm, which refuse to run without it.
    """
    layers = [m for m in _batchnorm_layers(module).values() if m.momentum is not None]
    layers = [m for m in layers if m.num_batches_tracked is not None and not isinstance(m, nn.SyncBatchNorm)]
    counters = [m.num_batches_tracked for m in layers]
    for layer in layers:
        layer.__dict__["num_batches_tracked"] = None  # hides the buffer from forward, not from state_dict
    return counters


def _batchnorm_layers(module: nn.Module) -> dict[str, _BatchNorm]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)}
