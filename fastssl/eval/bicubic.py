"""The views of the transfer protocol: whole images or random crops, resized by Pillow's bicubic filter."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from fastssl.augment.normalise import normalise_bytes
from fastssl.augment.params import ViewParams
from fastssl.batch import ImageBatch


def bicubic_eval_view(batch: ImageBatch, size: int, resize: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Short side to `resize` pixels, centre crop of `size`, normalised: (B, 3, size, size), channels_last."""
    views = []
    for i in range(batch.size):
        image = batch.image(i)
        height, width = image.shape[:2]
        short = min(height, width)
        rows, columns = height * resize // short, width * resize // short
        top, left = round((rows - size) / 2), round((columns - size) / 2)
        views.append(resize_bicubic(image, rows, columns)[:, top : top + size, left : left + size])
    return normalise_views(views, dtype)


def bicubic_crop_view(batch: ImageBatch, params: ViewParams, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The crops and flips that `params` say, resized to size x size and normalised: (B, 3, size, size)."""
    boxes = zip(*(t.tolist() for t in (params.top, params.left, params.crop_height, params.crop_width, params.flip)))
    views = []
    for i, (top, left, height, width, flip) in enumerate(boxes):
        view = resize_bicubic(batch.image(i)[top : top + height, left : left + width], size, size)
        views.append(view.flip(2) if flip else view)
    return normalise_views(views, dtype)


def resize_bicubic(image: Tensor, height: int, width: int) -> Tensor:
    """(H, W, 3) uint8 to (3, height, width) uint8: by Pillow on the CPU, by the same filter in float32 on a GPU."""
    if image.device.type == "cpu":
        resized = Image.fromarray(image.numpy()).resize((width, height), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1)
    planes = image.permute(2, 0, 1)[None].float()
    resized = interpolate(planes, (height, width), mode="bicubic", antialias=True, align_corners=False)
    return resized.round_().clamp_(0, 255).to(torch.uint8)[0]


def normalise_views(views: list[Tensor], dtype: torch.dtype) -> Tensor:
    """B views (3, S, S) uint8 as (B, 3, S, S), normalised, channels_last."""
    return normalise_bytes(torch.stack(views).contiguous(memory_format=torch.channels_last), dtype)
