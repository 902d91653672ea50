"""Applies operations to some images of a batch only, and the four jitter operations in each image's own order."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastssl.augment.color import hue_levels, update_brightness, update_contrast, update_hue, update_saturation
from fastssl.augment.params import ViewParams

# (function, parameter, the value that changes nothing), numbered as in `ViewParams.order`
OPERATIONS = (
    (update_brightness, "brightness", 1.0),
    (update_contrast, "contrast", 1.0),
    (update_saturation, "saturation", 1.0),
    (update_hue, "hue", 0.0),
)


def jitter_order(order: Tensor) -> Tensor:
    """order (C,) in [0, 24) -> (C, 4): the n-th of itertools.permutations(range(4)) for each n, without a table."""
    first, rest = order // 6, order % 6
    second = rest // 2
    second = second + (second >= first)
    third = rest % 2
    third = third + (third >= torch.minimum(first, second))
    third = third + (third >= torch.maximum(first, second))
    return torch.stack([first, second, third, 6 - first - second - third], dim=1)


def jitter_plan(params: ViewParams) -> Tensor:
    """(B, 4, 4) bool: whether image b gets operation n at position p, as [b, p, n]."""
    changes = torch.stack([getattr(params, name) != identity for _, name, identity in OPERATIONS], dim=1)
    number = torch.arange(4, device=changes.device, dtype=params.order.dtype)
    return (params.jitter[:, None] & changes)[:, None, :] & (jitter_order(params.order)[:, :, None] == number)


def jitter_code(params: ViewParams) -> tuple[Tensor, Tensor]:
    """The plan and the hue's turn in whole levels of 1/255, both (B,), for compiled code.

    A plan has three bits for the operation at each position, 7 for none; the first is in the lowest bits.
    """
    wanted = jitter_plan(params).any(dim=2)  # (B, 4): whether there is an operation at this position
    order = torch.where(wanted, jitter_order(params.order), 7)
    place = torch.arange(4, device=order.device)
    return (order << (3 * place)).sum(dim=1), hue_levels(params.hue)


def apply_jitter(x: Tensor, plan: Tensor, params: ViewParams) -> Tensor:
    """Applies brightness, contrast, saturation and hue to x (C, 3, S, S), as `plan` (C, 4, 4) says."""
    for masks in plan.unbind(1):
        for mask, (update, name, _) in zip(masks.unbind(1), OPERATIONS):
            x = apply_where(mask, x, update, getattr(params, name))
    return x


def apply_where(mask: Tensor, x: Tensor, update: Callable[..., None], *params: Tensor) -> Tensor:
    """x after `update(x, *params)` for the images where `mask` (C,) is true; may overwrite x."""
    if x.device.type == "cpu":
        return apply_chosen(mask, x, update, *params)
    return apply_everywhere(mask, x, update, *params)


def apply_everywhere(mask: Tensor, x: Tensor, update: Callable[..., None], *params: Tensor) -> Tensor:
    """`apply_where` that computes all images, because choosing among them would be a sync."""
    changed = x.clone()
    update(changed, *params)
    return torch.where(mask.view(-1, 1, 1, 1), changed, x)


def apply_chosen(mask: Tensor, x: Tensor, update: Callable[..., None], *params: Tensor) -> Tensor:
    """`apply_where` that computes only the images in the mask."""
    fires = mask.tolist()
    if True not in fires:
        return x
    if False not in fires:
        update(x, *params)
        return x
    rows = mask.nonzero()[:, 0]
    part = x.index_select(0, rows)  # several times faster than x[rows], as is the loop below than x[rows] = part
    update(part, *(p[rows] for p in params))
    for row, image in zip(rows.tolist(), part.unbind(0)):
        x[row].copy_(image)
    return x
