"""The parameters of a view, for each image: pure functions of (seed, epoch, sample index, view, draw number).

So they do not depend on the loader, the batch or the rank. They are computed in float64 from exact 24-bit uniforms, by
sums, products, quotients and square roots, which IEEE 754 rounds alike on every device, and stored as float32 or int.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastssl.augment.crops import central_square, pair_crops, random_crop
from fastssl.batch import ImageBatch
from fastssl.random_key import uniform

if TYPE_CHECKING:
    from fastssl.augment.policy import Policy

MIN_BLUR_SIGMA = 0.01  # pixels; changes no byte, while 0 would cause a division by 0
MAX_BLUR_SIGMA = 2.0  # pixels; determines the number of taps

# The number of each draw: word `draw` of the Philox stream `view` of (seed, epoch, index). kernels/views_draw.py, which
# draws inside a kernel, must use the same numbers and the same arithmetic. Draws 0 to 21 are the crop's (crops.py).
DRAW_FLIP, DRAW_JITTER, DRAW_ORDER = 22, 23, 24
DRAW_BRIGHTNESS, DRAW_CONTRAST, DRAW_SATURATION, DRAW_HUE = 25, 26, 27, 28
DRAW_GREY, DRAW_BLUR, DRAW_SIGMA, DRAW_SOLARISE = 29, 30, 31, 32
DRAW_HIDE_CELLS, DRAW_HIDE_KEY = 33, 34
NUM_DRAWS = 35
MAX_HIDE_CELLS = 16

# Factors are multiples of 2^-13, so that their products with pixel differences are exact in float32, fused or not.
FACTOR_STEPS = 8192.0


class ViewParams(NamedTuple):
    """How each image of a batch becomes a view; all tensors are (B,), on the batch's device."""

    top: Tensor  # int32, the crop box in pixels of the image
    left: Tensor  # int32
    crop_height: Tensor  # int32, >= 1
    crop_width: Tensor  # int32, >= 1
    flip: Tensor  # bool
    grey_before: Tensor  # bool, greyscale before the jitter
    jitter: Tensor  # bool, the four factors below count only where it is true
    order: Tensor  # int32 in [0, 24): which permutation of (brightness, contrast, saturation, hue), see jitter.py
    brightness: Tensor  # float32 factor >= 0; 1 changes nothing
    contrast: Tensor  # float32
    saturation: Tensor  # float32
    hue: Tensor  # float32 turns in [-0.5, 0.5]; 0 changes nothing
    grey_after: Tensor  # bool, greyscale after the jitter
    blur: Tensor  # bool
    sigma: Tensor  # float32 pixels, in [MIN_BLUR_SIGMA, MAX_BLUR_SIGMA]
    solarise: Tensor  # bool
    hide_cells: Tensor  # int32 cells along a side of the hide-and-seek grid: 16, 8, 4; 0 hides nothing
    hide_p: Tensor  # float32 probability of each cell
    hide_key: Tensor  # int64 in [0, 2^24), from which the cells are drawn

    def split(self, count: int) -> list[ViewParams]:
        """Parts with the parameters of `count` images each; the last part may have fewer."""
        return [ViewParams(*part) for part in zip(*(t.split(count) for t in self))]


def sample_params(policy: Policy, batch: ImageBatch, seed: int, epoch: int, view: int) -> ViewParams:
    """Draws the parameters of view `view` (0 = q, 1 = k) for every image; a pure function, see the top of the file."""
    u = uniform(seed, epoch, batch.index, view, NUM_DRAWS).double()  # (B, NUM_DRAWS)
    params = _params_of(policy, u, batch.height, batch.width)
    return _pair_up(policy, batch, seed, epoch, [(view, params)])[0]


def sample_both(policy: Policy, batch: ImageBatch, seed: int, epoch: int) -> tuple[ViewParams, ViewParams]:
    """`sample_params` for both views at once, which halves the launches on a GPU."""
    u = torch.cat([uniform(seed, epoch, batch.index, view, NUM_DRAWS) for view in (0, 1)]).double()
    both = _params_of(policy, u, batch.height.repeat(2), batch.width.repeat(2))
    views = [ViewParams(*part) for part in zip(*(t.chunk(2) for t in both))]
    view_q, view_k = _pair_up(policy, batch, seed, epoch, list(enumerate(views)))
    return view_q, view_k


def _pair_up(
    policy: Policy, batch: ImageBatch, seed: int, epoch: int, views: list[tuple[int, ViewParams]]
) -> list[ViewParams]:
    """The views, with new crops for the images whose two crops the policy draws together (`crop_iou`)."""
    if policy.crop_iou is None:
        return [params for _, params in views]
    paired, boxes = pair_crops(policy, batch, seed, epoch)
    names = ("top", "left", "crop_height", "crop_width")
    return [
        params._replace(**{n: torch.where(paired, new.int(), getattr(params, n)) for n, new in zip(names, boxes[view])})
        for view, params in views
    ]


def _params_of(policy: Policy, u: Tensor, height: Tensor, width: Tensor) -> ViewParams:
    """The parameters for the draws u (N, NUM_DRAWS) float64 and images of these sizes (N,)."""
    ranges = policy.ranges()

    def drawn(draw: int, name: str) -> Tensor:
        low, span = ranges[name]
        return u[:, draw] * span + low

    def factor(draw: int, name: str) -> Tensor:
        return (torch.round(drawn(draw, name) * FACTOR_STEPS) * (1 / FACTOR_STEPS)).float()

    height, width = height.double(), width.double()
    box = central_square(height, width) if policy.crop_scale is None else random_crop(policy, u, height, width)
    top, left, crop_height, crop_width = (t.int() for t in box)
    jitter, grey = u[:, DRAW_JITTER] < policy.jitter_p, u[:, DRAW_GREY] < policy.grey_p
    nothing = torch.zeros_like(grey)
    grid = (u[:, DRAW_HIDE_CELLS] * 4).floor().int()  # 0, 1, 2, 3 -> 0, 16, 8, 4 cells
    return ViewParams(
        top=top,
        left=left,
        crop_height=crop_height,
        crop_width=crop_width,
        flip=u[:, DRAW_FLIP] < policy.flip_p,
        grey_before=grey if policy.grey_first else nothing,
        jitter=jitter,
        order=(u[:, DRAW_ORDER] * 24).floor().int(),
        brightness=factor(DRAW_BRIGHTNESS, "brightness"),
        contrast=factor(DRAW_CONTRAST, "contrast"),
        saturation=factor(DRAW_SATURATION, "saturation"),
        hue=drawn(DRAW_HUE, "hue").float(),
        grey_after=nothing if policy.grey_first else grey,
        blur=u[:, DRAW_BLUR] < policy.blur_p,
        sigma=drawn(DRAW_SIGMA, "sigma").float(),
        solarise=u[:, DRAW_SOLARISE] < policy.solarise_p,
        hide_cells=((grid > 0).int() * policy.hide_and_seek * (2 * MAX_HIDE_CELLS)) >> grid,
        hide_p=torch.full_like(u[:, 0], policy.hide_p, dtype=torch.float32),
        hide_key=(u[:, DRAW_HIDE_KEY] * 2**24).long(),
    )
