"""Checks statistics of a policy's draws: rates, ranges, both directions of hue, all orders, and contrast's anchor."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fastssl.augment.normalise import MEAN, STD
from fastssl.augment.params import sample_params
from fastssl.augment.policy import Policy, make_policy
from fastssl.augment.views import make_view
from fastssl.batch import ImageBatch, pack_images

DRAWS = 20_000
_FAR = 4.5  # standard deviations, exceeded by one correct count in 150,000


def count_checks(policy: Policy) -> Iterator[tuple[str, bool, str]]:
    """(what is checked, whether it holds, what was found) for each check of a policy."""
    index = torch.arange(DRAWS)
    sides = [torch.full((DRAWS,), side, dtype=torch.int32) for side in (375, 500)]
    batch = ImageBatch(torch.zeros(0, dtype=torch.uint8), index * 0, *sides, index, index * 0, 500)
    p = sample_params(policy, batch, 0, 0, 0)
    for name, mask, rate in [
        ("flip", p.flip, policy.flip_p),
        ("jitter", p.jitter, policy.jitter_p),
        ("greyscale", p.grey_before | p.grey_after, policy.grey_p),
        ("blur", p.blur, policy.blur_p),
        ("solarise", p.solarise, policy.solarise_p),
    ]:
        yield f"{name} has probability {rate:g}", *_rate(mask, rate)
    for name in ("brightness", "contrast", "saturation"):
        strength = getattr(policy, name)
        yield f"{name} spans its range", *_range(getattr(p, name), max(0, 1 - strength), 1 + strength)
    yield "hue spans its range, both ways", *_range(p.hue, -policy.hue, policy.hue)
    yield "hue turns either way equally often", *_rate(p.hue > 0, 0.5 if policy.hue else 0.0)
    yield "blur's sigma spans its range", *_range(p.sigma, *policy.blur_sigma)
    counts = torch.bincount(p.order, minlength=24)
    farthest = float((counts - DRAWS / 24).abs().max() / math.sqrt(DRAWS / 24))
    yield "the 24 orders are equally frequent", farthest < _FAR, f"{int(counts.min())} to {int(counts.max())}"


def anchor_check() -> tuple[str, bool, str]:
    """Contrast 0 leaves the mean of the image at that point of the order: before or after a brightness of 2."""
    image = np.full((8, 8, 3), 50, dtype=np.uint8)
    image[:4] = 200  # doubled before contrast: 100 and 255, mean 177.5; doubled after it: twice the mean of 125
    batch = pack_images([image] * 2, [0, 1], [0, 0])
    policy = make_policy("none", jitter_p=1.0, brightness=1.0, contrast=1.0)
    p, two = sample_params(policy, batch, 0, 0, 0), torch.full((2,), 2.0)
    view = make_view(batch, p._replace(order=torch.tensor([0, 6]).int(), brightness=two, contrast=two * 0), 8)
    found = [round((float(level) * STD[0] + MEAN[0]) * 255) for level in view[:, 0, 0, 0]]
    return "contrast uses the mean at its place", found == [178, 250], f"{found}, expected [178, 250]"


def _rate(mask: Tensor, rate: float) -> tuple[bool, str]:
    found = float(mask.double().mean())
    return abs(found - rate) <= _FAR * math.sqrt(rate * (1 - rate) / len(mask)), f"{found:.4f}"


def _range(values: Tensor, low: float, high: float) -> tuple[bool, str]:
    found = (float(values.min()), float(values.max()))
    slack = 0.01 * (high - low) + 1e-4
    inside = low - 1e-4 <= found[0] <= low + slack and high - slack <= found[1] <= high + 1e-4
    deviation = (high - low) / math.sqrt(12 * len(values))
    middle = abs(float(values.double().mean()) - (low + high) / 2) <= _FAR * deviation + 1e-4
    return inside and middle, f"{found[0]:.3f} to {found[1]:.3f}"
