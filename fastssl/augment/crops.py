"""Crop boxes: torchvision's random resized crop, and pairs of crops whose overlap lies within given bounds.

A box is (top, left, height, width), four float64 tensors of whole numbers, in pixels of the image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastssl.batch import ImageBatch
from fastssl.random_key import STREAM_PAIR, uniform

if TYPE_CHECKING:
    from fastssl.augment.policy import Policy

Box = tuple[Tensor, Tensor, Tensor, Tensor]

CROP_TRIES = 10
DRAW_CROP_AREA = 0  # draws 0 to 9, one for each try
DRAW_CROP_RATIO = 10  # draws 10 to 19
DRAW_TOP, DRAW_LEFT = 20, 21
# Pairs have a stream of their own: draw 0 decides who gets one, then each try of sizes and of places has four draws.
PAIR_TRIES = 64


def exact_exp(x: Tensor) -> Tensor:
    """e^x for float64 |x| <= 16, to 1e-13, by a Taylor series and squarings: the same bits in any batch, on any device.

    (torch.exp rounds differently in the vectorised and in the scalar part of a tensor.)
    """
    x = x * 2.0**-6
    power = torch.ones_like(x)
    for n in range(12, 0, -1):
        power = power * x * (1 / n) + 1
    for _ in range(6):
        power = power * power
    return power


def random_crop(policy: Policy, u: Tensor, height: Tensor, width: Tensor) -> Box:
    """The box of torchvision's RandomResizedCrop: the first of ten tries that fits, or else the largest central crop
    within the range of ratios. u: (B, NUM_DRAWS) uniforms."""
    low, high = policy.crop_ratio
    crop_width = torch.where(width > height * high, torch.round(height * high), width).clamp(min=1)
    crop_height = torch.where(width < height * low, torch.round(width * (1 / low)), height).clamp(min=1)
    areas, ratios = (u[:, first : first + CROP_TRIES] for first in (DRAW_CROP_AREA, DRAW_CROP_RATIO))
    w, h = _sides_of(policy, areas, ratios, (height * width)[:, None])  # (B, CROP_TRIES)
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
    for t in reversed(range(CROP_TRIES)):
        crop_width = torch.where(fits[:, t], w[:, t], crop_width)
        crop_height = torch.where(fits[:, t], h[:, t], crop_height)
    central = ~fits.any(dim=1)
    rows, columns = height - crop_height, width - crop_width
    top = torch.where(central, rows * 0.5, u[:, DRAW_TOP] * (rows + 1)).floor()
    left = torch.where(central, columns * 0.5, u[:, DRAW_LEFT] * (columns + 1)).floor()
    return top, left, crop_height, crop_width


def _sides_of(policy: Policy, u_area: Tensor, u_ratio: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Width and height of the crops for these draws, in images of so many pixels."""
    (area_low, area_span), (log_low, log_span) = (policy.ranges()[name] for name in ("area", "log_ratio"))
    side = (pixels * (u_area * area_span + area_low)).sqrt()
    root_ratio = exact_exp((u_ratio * log_span + log_low) * 0.5)
    return torch.round(side * root_ratio), torch.round(side / root_ratio)


def central_square(height: Tensor, width: Tensor) -> Box:
    """The box of the largest central square."""
    side = torch.minimum(height, width)
    return ((height - side) * 0.5).floor(), ((width - side) * 0.5).floor(), side, side


def pair_crops(policy: Policy, batch: ImageBatch, seed: int, epoch: int) -> tuple[Tensor, tuple[Box, Box]]:
    """Draws two crops of each image whose IoU lies within `policy.crop_iou`, neither inside the other.

    Sizes: the first of PAIR_TRIES independent pairs that can overlap so. Places: the first of PAIR_TRIES pairs that do;
    the first try is uniform, later ones move alternately closer together and further apart, up to opposite corners.
    If no pair fits, the one with the nearest IoU is used.
    Returns ((B,) bool, which images get these crops; (box of q, box of k)).
    """
    u = uniform(seed, epoch, batch.index, STREAM_PAIR, 1 + 8 * PAIR_TRIES).double()
    sizes, places = u[:, 1:].unflatten(1, (2, PAIR_TRIES, 2, 2)).unbind(1)  # (B, tries, view, draw)
    height, width = (side.double()[:, None, None] for side in (batch.height, batch.width))
    w, h = (side.clamp(min=1) for side in _sides_of(policy, sizes[..., 0], sizes[..., 1], height * width))
    outside = ((w > width) | (h > height)).any(dim=2)
    w, h = torch.minimum(w, width), torch.minimum(h, height)
    least, most = _reach(height, width, h, w)
    bounds = policy.crop_iou
    miss = torch.maximum(least - bounds[1], bounds[0] - most).clamp(min=0) + 2 * (least > most) + 2 * outside
    best = _first_smallest(miss)[:, None, None].expand(-1, 1, 2)
    w, h = w.gather(1, best), h.gather(1, best)  # (B, 1, view)
    tries = torch.arange(PAIR_TRIES, device=u.device)[:, None, None]
    apart = (places > places.flip(2)).double()  # opposite corners, each on the side where it already is
    # multiplied, because a GPU divides by a number differently than a CPU
    fraction = torch.arange(PAIR_TRIES, device=u.device, dtype=torch.float64) * (1 / (PAIR_TRIES - 1))
    goal = torch.where(tries % 2 == 0, (places + places.flip(2)) * 0.5, apart)
    places = places + (goal - places) * fraction.view(-1, 1, 1)
    top, left = ((places[..., i] * (room + 1)).floor() for i, room in enumerate((height - h, width - w)))
    top, left = torch.minimum(top, height - h), torch.minimum(left, width - w)  # the last place may be exactly 1
    iou, nested = _overlap((top, left, h, w))
    best = _first_smallest(torch.maximum(bounds[0] - iou, iou - bounds[1]).clamp(min=0) + 2 * nested)
    row = torch.arange(batch.size, device=u.device)
    boxes = [(top[row, best, view], left[row, best, view], h[:, 0, view], w[:, 0, view]) for view in (0, 1)]
    return u[:, 0] < policy.crop_iou_p, (boxes[0], boxes[1])


def _first_smallest(x: Tensor) -> Tensor:
    """The first place of the smallest value in each row of (B, n), on every device."""
    place = torch.arange(x.shape[1], device=x.device)
    return torch.where(x == x.amin(dim=1, keepdim=True), place, x.shape[1]).amin(dim=1)


def _reach(height: Tensor, width: Tensor, h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest IoU of two crops of sizes (h, w) (..., 2), neither of which is inside the other.

    The largest is below the smallest if one crop is always inside the other.
    """
    far = torch.arange(2, device=h.device)  # the smallest: one crop in the first corner, the other in the opposite one
    least, nested = _overlap((far * (height - h), far * (width - w), h, w))
    area, most = h * w, torch.full_like(least, -1.0)
    larger = torch.stack([area[..., 0] >= area[..., 1], area[..., 0] < area[..., 1]], dim=-1)
    down, right = (torch.minimum(room, larger.double()) for room in (height - h, width - w))
    for top, left in ((down, 0 * right), (0 * down, right)):  # the largest: the larger crop moved by one pixel
        iou, inside = _overlap((top, left, h, w))
        most = torch.where(inside, most, torch.maximum(most, iou))
    return torch.where(nested, 1.0, least), most


def _overlap(boxes: Box) -> tuple[Tensor, Tensor]:
    """The IoU of pairs of boxes (..., 2), and whether one box lies inside the other; both (...)."""
    top, left, height, width = boxes
    shared_height = ((top + height).amin(dim=-1) - top.amax(dim=-1)).clamp(min=0)
    shared_width = ((left + width).amin(dim=-1) - left.amax(dim=-1)).clamp(min=0)
    shared, area = shared_height * shared_width, height * width
    return shared / (area.sum(dim=-1) - shared), shared == area.amin(dim=-1)
