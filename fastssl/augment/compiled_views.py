"""The augmentation on a CPU: threads that run compiled loops without the GIL, with the bits of the reference."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastssl.augment.blur import gaussian_taps
from fastssl.augment.compiled_loops import finish_views
from fastssl.augment.compiled_resample import resize_boxes
from fastssl.augment.hide import update_hide
from fastssl.augment.jitter import jitter_code
from fastssl.augment.normalise import BITS, byte_levels
from fastssl.augment.params import ViewParams
from fastssl.augment.resize import crop_boxes
from fastssl.batch import ImageBatch
from fastssl.machine.threads import run_in_threads

TASK = 4  # views per task: few, so that all threads finish at about the same time


def make_views_compiled(
    batch: ImageBatch, params: tuple[ViewParams, ViewParams], size: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> tuple[Tensor, Tensor]:
    """`make_view` for both views, each in its dtype; each (B, 3, size, size), channels_last."""
    pixels, offset, width = (tensor.numpy() for tensor in (batch.pixels, batch.offset, batch.width))
    levels = [byte_levels(dtype).numpy() for dtype in dtypes]
    tables = [make_tables(batch, p) for p in params]
    views = [torch.empty((batch.size, size, size, 3), dtype=dtype) for dtype in dtypes]
    bits = [view.view(BITS[view.dtype.itemsize]).flatten(1, 2).numpy() for view in views]  # (B, S * S, 3)

    def work(task: tuple[int, slice]) -> None:
        view, part = task
        boxes, *rows = (table[part] for table in tables[view])
        crops = np.empty((len(boxes), size, size, 3), np.uint8)
        resize_boxes(pixels, offset[part], width[part], boxes, crops)
        finish_views(crops, *rows, levels[view], bits[view][part])

    parts = [slice(first, first + TASK) for first in range(0, batch.size, TASK)]
    run_in_threads(work, [(view, part) for part in parts for view in range(len(views))])
    view_q, view_k = (view.permute(0, 3, 1, 2) for view in views)
    for view, p in zip((view_q, view_k), params):
        if view.dtype != torch.uint8:  # bytes are neither normalised nor hidden
            for i in p.hide_cells.nonzero()[:, 0].tolist():
                update_hide(view[i : i + 1], p.hide_cells[i : i + 1], p.hide_p[i : i + 1], p.hide_key[i : i + 1])
    return view_q, view_k


def make_tables(batch: ImageBatch, p: ViewParams) -> tuple[np.ndarray, ...]:
    """The parameters of each image: `resize_boxes`'s boxes, then `finish_views`'s ints, factors and taps."""
    plan, levels = jitter_code(p)
    ints = torch.stack(
        [t.int() for t in (p.flip, p.grey_before, plan, levels, p.grey_after, p.blur, p.solarise)], dim=1
    )
    factors = torch.stack([p.brightness, p.contrast, p.saturation], dim=1)
    return tuple(table.numpy() for table in (crop_boxes(batch, p), ints, factors, gaussian_taps(p.sigma)))
