"""The views on a CPU, by threads that hold no GIL: torch's resize, then compiled loops with the reference's bits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastssl.augment.blur import gaussian_taps
from fastssl.augment.compiled_loops import finish_view
from fastssl.augment.hide import update_hide
from fastssl.augment.jitter import jitter_code
from fastssl.augment.normalise import BITS, byte_levels
from fastssl.augment.params import ViewParams
from fastssl.augment.resample import resize_box
from fastssl.batch import ImageBatch
from fastssl.threads import run_in_threads

TASK = 8  # views a thread takes at once


def make_views_compiled(
    batch: ImageBatch, params: tuple[ViewParams, ViewParams], size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`make_view` for both views; each (B, 3, size, size), channels_last."""
    views = [torch.empty((batch.size, size, size, 3), dtype=dtype) for _ in params]
    levels = byte_levels(dtype).numpy()
    places = list(zip(batch.offset.tolist(), batch.width.tolist()))
    tables = [make_rows(p) for p in params]
    bits = [view.view(BITS[dtype.itemsize]).flatten(1, 2).numpy() for view in views]  # (B, S * S, 3)

    def work(task: tuple[int, int]) -> None:
        view, first = task
        boxes, ints, factors, taps = tables[view]
        for i in range(first, min(first + TASK, batch.size)):
            crop = resize_box(batch.pixels, *places[i], boxes[i], size).permute(0, 2, 3, 1)[0].contiguous()
            finish_view(crop.numpy(), ints[i], factors[i], taps[i], levels, bits[view][i])

    run_in_threads(work, [(view, first) for first in range(0, batch.size, TASK) for view in range(len(views))])
    views = [view.permute(0, 3, 1, 2) for view in views]
    for view, p in zip(views, params):
        for i in p.hide_cells.nonzero()[:, 0].tolist():
            update_hide(view[i : i + 1], *(t[i : i + 1] for t in (p.hide_cells, p.hide_p, p.hide_key)))
    return views[0], views[1]


def make_rows(p: ViewParams) -> tuple[list[tuple[int, ...]], np.ndarray, np.ndarray, np.ndarray]:
    """The parameters image by image: crop boxes, and the rows of `finish_view`'s ints, factors and taps."""
    boxes = list(zip(*(t.tolist() for t in (p.top, p.left, p.crop_height, p.crop_width))))
    plan, levels = jitter_code(p)
    ints = torch.stack(
        [t.int() for t in (p.flip, p.grey_before, plan, levels, p.grey_after, p.blur, p.solarise)], dim=1
    )
    factors = torch.stack([p.brightness, p.contrast, p.saturation], dim=1)
    return boxes, ints.numpy(), factors.numpy(), gaussian_taps(p.sigma).numpy()
