"""ImageBatch -> views: crop and resize, flip, colour jitter, greyscale, blur, normalise; all parameters per image.

This is the plain PyTorch chain: the path of the CPU, and the truth any faster kernel is held to. Between operations
pixels are whole numbers 0..255, as in the Pillow pipelines it reproduces. The result for an image has the same bits
in whatever batch it sits, for any number of threads: all sums over pixels or taps are exact (see color.py, blur.py).
On a GPU nothing waits for the device when `max_side` is given.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastssl.augment.blur import gaussian_taps, update_blur
from fastssl.augment.color import update_greyscale, update_solarise
from fastssl.augment.hide import hide_cells
from fastssl.augment.jitter import apply_jitter, apply_where, jitter_plan
from fastssl.augment.params import ViewParams, sample_params
from fastssl.augment.policy import Policy
from fastssl.augment.resample import crop_resize, eval_resize
from fastssl.batch import ImageBatch

MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB in 0..1
STD = (0.229, 0.224, 0.225)

CPU_CHUNK = 150_000  # pixels x channels in flight: one 224-pixel view, so that every operation stays in the L2 cache
GPU_CHUNK = 1 << 28  # the same, of the intermediate image whose rows are not yet resized


def make_views(
    batch: ImageBatch,
    policy: Policy,
    size: int,
    seed: int,
    epoch: int,
    dtype: torch.dtype = torch.float32,
    max_side: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(view_q, view_k) of `batch` under `policy`: two independent draws of parameters, then `make_view`."""
    view_q, view_k = (
        make_view(batch, sample_params(policy, batch, seed, epoch, view), size, dtype, max_side) for view in (0, 1)
    )
    return view_q, view_k


def make_view(
    batch: ImageBatch, params: ViewParams, size: int, dtype: torch.dtype = torch.float32, max_side: int | None = None
) -> Tensor:
    """One view of every image: (B, 3, size, size), channels_last, normalised with ImageNet's mean and deviation.

    params: from `sample_params`, on the batch's device. max_side: the longest side of any crop box where the host
    knows a bound; without it a GPU batch waits once for the device, to read it. Raises ValueError for size < 1.
    """
    _check_size(size)
    if max_side is None:
        max_side = int(torch.maximum(params.crop_height, params.crop_width).max()) if batch.size else 1
    out = _empty_view(batch, size, dtype)
    plan, taps = jitter_plan(params), gaussian_taps(params.sigma)
    for part in _chunks(batch, size, max_side):
        p = params.rows(part)
        x = crop_resize(_images(batch, part), p, size, max_side).to(
            torch.float32, memory_format=torch.contiguous_format
        )
        x = apply_where(p.flip, x, _update_flip)
        x = apply_where(p.grey_before, x, update_greyscale)
        x = apply_jitter(x, plan[part], p)
        x = apply_where(p.grey_after, x, update_greyscale)
        x = apply_where(p.blur, x, update_blur, taps[part])
        x = apply_where(p.solarise, x, update_solarise)
        _update_normalise(x)
        out[part] = hide_cells(x, p.hide_grid, p.hide_p, p.hide_key).to(dtype)
    return out


def make_eval_view(
    batch: ImageBatch, size: int, resize: int, dtype: torch.dtype = torch.float32, max_side: int | None = None
) -> Tensor:
    """Short side to `resize` pixels, centre crop of `size`, normalised: (B, 3, size, size), channels_last.

    torchvision's Resize and CenterCrop on Pillow images, to 1/255. max_side: as in `make_view`, of whole images.
    Raises ValueError for size < 1 and for resize < size, where the crop would not lie inside the image.
    """
    _check_size(size)
    if resize < size:
        raise ValueError(
            f"an evaluation view of {size} pixels needs its short side resized to at least that, got {resize}"
        )
    if max_side is None:
        max_side = int(torch.maximum(batch.height, batch.width).max()) if batch.size else 1
    out = _empty_view(batch, size, dtype)
    for part in _chunks(batch, size, max_side):
        x = eval_resize(_images(batch, part), size, resize, max_side)
        x = x.to(torch.float32, memory_format=torch.contiguous_format)
        _update_normalise(x)
        out[part] = x.to(dtype)
    return out


def _update_flip(x: Tensor) -> None:
    x.copy_(x.flip(3))


def _update_normalise(x: Tensor) -> None:
    for plane, mean, std in zip(x.unbind(1), MEAN, STD):
        plane.sub_(255 * mean).mul_(1 / (255 * std))


def _check_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"the size of a view must be at least 1 pixel, got {size}")


def _empty_view(batch: ImageBatch, size: int, dtype: torch.dtype) -> Tensor:
    shape = (batch.size, 3, size, size)
    return torch.empty(shape, dtype=dtype, device=batch.pixels.device, memory_format=torch.channels_last)


def _images(batch: ImageBatch, part: slice) -> ImageBatch:
    return ImageBatch(batch.pixels, *(t[part] for t in batch[1:]))


def _chunks(batch: ImageBatch, size: int, max_side: int) -> Iterator[slice]:
    if batch.pixels.device.type == "cpu":
        step = max(1, CPU_CHUNK // (3 * size * size))
    else:
        step = max(1, GPU_CHUNK // (3 * size * max(size, max_side)))
    for start in range(0, batch.size, step):
        yield slice(start, start + step)
