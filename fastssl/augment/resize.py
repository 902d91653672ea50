"""Resizes crops and whole images to S x S: by `resample_reference` or, on a CPU, faster with the same bits."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastssl.augment.params import ViewParams
from fastssl.augment.resample import crop_axes, eval_axes, resample_reference
from fastssl.batch import ImageBatch
from fastssl.machine.compiled import numba_obstacle

NEEDLE = 8  # images with a larger ratio of sides are not resized as a whole, since most of that is cut off again


def crop_boxes(batch: ImageBatch, params: ViewParams) -> Tensor:
    """The crops of a batch on the CPU, (C, 4) int32: top, left, height and width.

    Raises ValueError for a box outside its image, or an image outside the batch's bytes: compiled loops do not check.
    """
    boxes = torch.stack([params.top, params.left, params.crop_height, params.crop_width], dim=1)
    end, height, width = boxes[:, :2] + boxes[:, 2:], batch.height, batch.width
    inside = (boxes[:, :2] >= 0).all() and (boxes[:, 2:] > 0).all() and (end <= torch.stack([height, width], 1)).all()
    held = (batch.offset >= 0).all() and (batch.offset + 3 * height.long() * width <= len(batch.pixels)).all()
    if not (inside and held):
        raise ValueError("a crop lies outside its image, or an image outside the bytes of its batch")
    return boxes


def crop_resize(batch: ImageBatch, params: ViewParams, size: int) -> Tensor:
    """The crop boxes of `params` resized to size x size, and flipped: (C, 3, S, S) uint8 in any memory format."""
    if batch.pixels.device.type == "cpu" and numba_obstacle() is None:
        from fastssl.augment.compiled_resample import resize_boxes

        out = torch.empty((batch.size, size, size, 3), dtype=torch.uint8)
        windows = (batch.pixels, batch.offset, batch.width, crop_boxes(batch, params), out)
        resize_boxes(*(tensor.numpy() for tensor in windows))
        x = out.permute(0, 3, 1, 2)
    else:
        x = resample_reference(batch, *crop_axes(params, size), size)
    return torch.where(params.flip.view(-1, 1, 1, 1), x.flip(3), x)


def eval_resize(batch: ImageBatch, size: int, resize: int) -> Tensor:
    """Whole images resized to a short side of `resize`, and their central size x size: (C, 3, S, S) uint8."""
    axes = eval_axes(batch, size, resize)
    if batch.pixels.device.type != "cpu":
        return resample_reference(batch, *axes, size)
    out = torch.empty((batch.size, 3, size, size), dtype=torch.uint8, memory_format=torch.channels_last)
    for i in range(batch.size):
        height, width = (round(float(axis.length[i] / axis.scale[i])) for axis in axes)
        if max(height, width) > NEEDLE * resize:
            alone = batch.select(slice(i, i + 1))
            out[i] = resample_reference(alone, axes[0].of(i), axes[1].of(i), size)[0]
        else:
            top, left = (int(axis.offset[i]) for axis in axes)
            image = Image.fromarray(batch.image(i).numpy()).resize((width, height), Image.Resampling.BILINEAR)
            view = image.crop((left, top, left + size, top + size))
            out[i] = torch.from_numpy(np.array(view)).permute(2, 0, 1)
    return out
