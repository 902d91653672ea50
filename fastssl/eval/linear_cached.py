"""Linear classifiers on features computed once, for many settings of learning rate and weight decay at the same time.

The weights of S settings lie side by side as (C, S Y), so a step is one matrix product whatever S. Each setting's
columns are trained as they would be alone: from the same initial weights, on the same order of images.

Shapes: n images, C features, B images of a batch, S settings, Y classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.eval.classifier import count_hits, initial_weights
from fastssl.eval.compute import slices
from fastssl.eval.memory import Rows
from fastssl.loaders.order import epoch_order
from fastssl.schedules import learning_rate


class Setting(NamedTuple):
    """One point of a sweep."""

    lr: float
    weight_decay: float


class Sweep(NamedTuple):
    """What all settings share."""

    epochs: int = 100
    batch_size: int = 256
    schedule: Sequence[int] = (60, 80)
    momentum: float = 0.9
    seed: int = 0


@torch.no_grad()
def fit_linear(
    features: Rows,
    labels: Tensor,
    num_classes: int,
    settings: Sequence[Setting],
    sweep: Sweep,
    *,
    device: torch.device | str = "cpu",
    bar: Callable[..., Iterable] = lambda items, *_: items,
) -> tuple[Tensor, Tensor]:
    """Trains by SGD with momentum on the mean cross entropy. Returns weights (S, Y, C) and biases (S, Y).

    features: (n, C), of any float dtype; computed in float64 if that is float64, else in float32. labels: (n,) int64.
    """
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    count, width = len(settings), features.shape[1]
    w, b = initial_weights(width, num_classes, sweep.seed)
    w = w.to(device, dtype).T.repeat(1, count).contiguous()  # (C, S Y)
    b = b.to(device, dtype).repeat(count)
    velocity_w, velocity_b = torch.zeros_like(w), torch.zeros_like(b)
    base = per_column([setting.lr for setting in settings], num_classes, w)
    decay = per_column([setting.weight_decay for setting in settings], num_classes, w)
    decays = any(setting.weight_decay for setting in settings)
    labels = labels.to(device)
    for epoch in bar(range(sweep.epochs), sweep.epochs, "classifiers"):
        rate = base * learning_rate(
            epoch, base_lr=1.0, epochs=sweep.epochs, steps_per_epoch=1, schedule="step", milestones=sweep.schedule
        )
        # moved to the device once an epoch: such a copy waits for all steps before it
        order = epoch_order(len(labels), sweep.seed, epoch).to(features.device)
        for rows in order.split(sweep.batch_size):
            x = features[rows].to(device, dtype)
            g = logit_gradient(torch.addmm(b, x, w), labels[rows.to(labels.device)], num_classes)
            velocity_w.addmm_(x.T, g, beta=sweep.momentum, alpha=1 / len(rows))
            velocity_b.mul_(sweep.momentum).add_(g.sum(0), alpha=1 / len(rows))
            if decays:
                velocity_w.addcmul_(w, decay)
                velocity_b.addcmul_(b, decay)
            w.addcmul_(velocity_w, rate, value=-1)
            b.addcmul_(velocity_b, rate, value=-1)
    return w.T.view(count, num_classes, width), b.view(count, num_classes)


def per_column(values: list[float], num_classes: int, like: Tensor) -> Tensor:
    """One value of each setting, repeated for that setting's columns: (S Y,)."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).repeat_interleave(num_classes)


def logit_gradient(logits: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """B times the gradient of the mean cross entropy at the logits (B, S Y), which it overwrites with it."""
    p = logits.view(len(labels), -1, num_classes)
    p -= p.amax(2, keepdim=True)
    p.exp_()
    p /= p.sum(2, keepdim=True)
    p.scatter_add_(2, labels[:, None, None].expand(-1, p.shape[1], 1), p.new_full((), -1.0).expand(*p.shape[:2], 1))
    return logits


@torch.no_grad()
def count_sweep_hits(features: Rows, labels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """How often each setting of `fit_linear` has an image's label first, and among the first five: (S, 2) int64."""
    (count, num_classes, width), hits = weight.shape, torch.zeros(len(weight), 2, dtype=torch.int64)
    w, b = weight.reshape(-1, width).T, bias.flatten()
    for part in slices(len(labels), 4096):
        logits = torch.addmm(b, features[part].to(w.device, w.dtype), w).view(-1, count, num_classes)
        truth = labels[part].to(w.device)
        hits += torch.stack([count_hits(own, truth) for own in logits.unbind(1)]).cpu()
    return hits
