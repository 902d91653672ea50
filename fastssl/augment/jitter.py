"""Who gets which operation: masks per image, and the four jitter operations in each image's own order."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastssl.augment.color import hue_levels, update_brightness, update_contrast, update_hue, update_saturation
from fastssl.augment.params import ViewParams

# the numbers that `ViewParams.order` permutes, with the value that changes nothing
OPERATIONS = (
    (update_brightness, "brightness", 1.0),
    (update_contrast, "contrast", 1.0),
    (update_saturation, "saturation", 1.0),
    (update_hue, "hue", 0.0),
)


def jitter_order(order: Tensor) -> Tensor:
    """order (C,) in [0, 24) -> (C, 4): row n is the n-th of itertools.permutations(range(4)), without a table."""
    first, rest = order // 6, order % 6
    second = rest // 2
    second = second + (second >= first)
    third = rest % 2
    third = third + (third >= torch.minimum(first, second))
    third = third + (third >= torch.maximum(first, second))
    return torch.stack([first, second, third, 6 - first - second - third], dim=1)


def jitter_plan(params: ViewParams) -> Tensor:
    """(B, 4, 4) bool: does image b get operation n at position p of its order?"""
    changes = torch.stack([getattr(params, name) != identity for _, name, identity in OPERATIONS], dim=1)
    number = torch.arange(4, device=changes.device, dtype=params.order.dtype)
    return (params.jitter[:, None] & changes)[:, None, :] & (jitter_order(params.order)[:, :, None] == number)


def jitter_code(params: ViewParams) -> tuple[Tensor, Tensor]:
    """For compiled code, both (B,): the plan, and the hue's turn in whole levels of 1/255.

    A plan has the operation of each place in three bits, 7 for none, the first in the lowest.
    """
    wanted = jitter_plan(params).any(dim=2)  # (B, 4): is anything done at this place?
    order = torch.where(wanted, jitter_order(params.order), 7)
    place = torch.arange(4, device=order.device)
    return (order << (3 * place)).sum(dim=1), hue_levels(params.hue)


def apply_jitter(x: Tensor, plan: Tensor, params: ViewParams) -> Tensor:
    """Brightness, contrast, saturation and hue as `plan` (C, 4, 4) has them, on x (C, 3, S, S)."""
    for masks in plan.unbind(1):
        for mask, (update, name, _) in zip(masks.unbind(1), OPERATIONS):
            x = apply_where(mask, x, update, getattr(params, name))
    return x


def apply_where(mask: Tensor, x: Tensor, update: Callable[..., None], *params: Tensor) -> Tensor:
    """x after `update(x, *params)` of the images where `mask` (C,) is true; may overwrite x."""
    if x.device.type == "cpu":
        return apply_chosen(mask, x, update, *params)
    return apply_everywhere(mask, x, update, *params)


def apply_everywhere(mask: Tensor, x: Tensor, update: Callable[..., None], *params: Tensor) -> Tensor:
    """`apply_where` that computes all images, for to choose among them the host would have to wait for the device."""
    changed = x.clone()
    update(changed, *params)
    return torch.where(mask.view(-1, 1, 1, 1), changed, x)


def apply_chosen(mask: Tensor, x: Tensor, update: Callable[..., None], *params: Tensor) -> Tensor:
    """`apply_where` that computes those images only."""
    fires = mask.tolist()
    if True not in fires:
        return x
    if False not in fires:
        update(x, *params)
        return x
    rows = mask.nonzero()[:, 0]
    part = x.index_select(0, rows)  # several times faster than x[rows], and the loop than x[rows] = part
    update(part, *(p[rows] for p in params))
    for row, image in zip(rows.tolist(), part.unbind(0)):
        x[row].copy_(image)
    return x
