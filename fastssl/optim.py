"""Optimizers by name: SGD, AdamW and LARS, none of which syncs with the host in a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

NAMES = ("sgd", "adamw", "lars")


def make_optimizer(
    model: nn.Module,
    name: str,
    *,
    lr: float,
    weight_decay: float,
    momentum: float = 0.9,
    exclude_norm_bias: bool = False,
) -> Optimizer:
    """An optimizer for those parameters of `model` that require a gradient.

    `sgd` and `adamw` are torch's, fused on CUDA and on the CPU; `lars` (You et al., arXiv 1708.03888) is timm's. Weight
    decay acts on all parameters, as in MoCo; `exclude_norm_bias` exempts those of at most one dimension (biases, norm
    scales). LARS always exempts these, also from its layer-wise rate, as SimCLR and BYOL do.

    Raises ValueError for an unknown name, or when nothing requires a gradient.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("nothing to optimise: no parameter requires a gradient")
    if name not in NAMES:
        raise ValueError(f"unknown optimizer {name!r}: choose one of {', '.join(NAMES)}")
    groups = _make_groups(trainable, weight_decay, exclude_norm_bias or name == "lars")
    if name == "lars":
        return _make_lars(groups, lr=lr, momentum=momentum)
    # Other devices may lack the fused kernels; None lets torch choose there.
    fused = True if all(p.device.type in ("cuda", "cpu") for p in trainable) else None
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=fused)
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=fused)
    optimizer.register_step_pre_hook(_zero_missing_momentum)
    return optimizer


def _make_groups(parameters: list[nn.Parameter], weight_decay: float, exclude_norm_bias: bool) -> list[dict[str, Any]]:
    if not exclude_norm_bias:
        return [{"params": parameters, "weight_decay": weight_decay}]
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _make_lars(groups: list[dict[str, Any]], **options: float) -> Optimizer:
    from timm.optim import Lars  # takes seconds to import

    # Without always_adapt timm uses the plain rate for a group without weight decay, which is right only for vectors.
    for group in groups:
        group["always_adapt"] = group["params"][0].ndim > 1
    return Lars(groups, **options)


def _zero_missing_momentum(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Gives SGD zero momentum buffers before its first step, which leaves that step's result the same.

    torch's fused SGD allocates them uninitialised and writes them in the first step. If the gradient scaler skips that
    step, whatever was in memory would become the momentum.
    """
    for group in optimizer.param_groups:
        if group["momentum"]:
            for p in group["params"]:
                if p.grad is not None and "momentum_buffer" not in optimizer.state[p]:
                    optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Sets the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def supports_scaler_without_sync(optimizer: Optimizer) -> bool:
    """Whether torch's GradScaler can step this optimizer without a sync (fused SGD and AdamW can, LARS cannot)."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def load_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Restores momentum and step counts, bit for bit, from the `state_dict()` of an optimizer of the same kind.

    Hyper-parameters (learning rate, weight decay, fused or not) stay those of `optimizer`, because they follow from the
    configuration and the machine. Buffers take the memory format of their parameters.

    Raises ValueError when `state` is that of another kind of optimizer or of other parameters.
    """
    own, saved = optimizer.param_groups, state["param_groups"]
    if [(len(g["params"]), "betas" in g) for g in own] != [(len(g["params"]), "betas" in g) for g in saved]:
        raise ValueError("the saved optimizer state belongs to another optimizer or model: its groups differ")
    parameters = [p for group in own for p in group["params"]]
    keys = [key for group in saved for key in group["params"]]
    for key, p in zip(keys, parameters):
        _check_shapes(state["state"].get(key, {}), p)
    groups = [{**own_group, "params": saved_group["params"]} for own_group, saved_group in zip(own, saved)]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
    # Fused kernels walk through memory, so a buffer must be laid out like its parameter.
    for p in parameters:
        for name, value in optimizer.state.get(p, {}).items():
            if torch.is_tensor(value) and value.shape == p.shape:
                optimizer.state[p][name] = torch.empty_like(p, dtype=value.dtype).copy_(value)


def _check_shapes(buffers: dict[str, Any], parameter: nn.Parameter) -> None:
    for name, value in buffers.items():
        if torch.is_tensor(value) and value.ndim and value.shape != parameter.shape:
            shapes = f"{tuple(value.shape)} for a parameter of shape {tuple(parameter.shape)}"
            raise ValueError(f"the saved optimizer state belongs to another model: its {name} has shape {shapes}")
