"""Turns an ImageBatch into views: crop and resize, flip, colour jitter, greyscale, blur, normalise; all per image.

`make_view` is the reference in plain PyTorch; the Triton kernels on a GPU (fused.py) and the compiled loops on a CPU
(compiled_views.py) give the same bits. Between operations pixels are whole numbers 0..255, as in the Pillow pipelines
that it reproduces. An image's result has the same bits in any batch and with any number of threads, because all sums
over pixels or taps are exact (color.py, blur.py). On a GPU there is no sync.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.augment.blur import gaussian_taps, update_blur
from fastssl.augment.choose import choose_augment_kernel
from fastssl.augment.color import update_greyscale, update_solarise
from fastssl.augment.fused import draw_views_fused
from fastssl.augment.hide import update_hide
from fastssl.augment.jitter import apply_jitter, apply_where, jitter_plan
from fastssl.augment.normalise import update_normalise
from fastssl.augment.params import ViewParams, sample_both
from fastssl.augment.policy import Policy
from fastssl.augment.resize import crop_resize, eval_resize
from fastssl.batch import ImageBatch

# How many views go through the chain together. On a CPU, views of 144 pixels or more go one by one, so that a channel
# stays in a core's L2 cache; smaller ones go together, as calls then cost more than memory traffic (both measured).
# On a GPU, as many as take little of its memory, counted before the rows are resized.
CPU_PIXELS, CPU_ALONE = 250_000, 144
GPU_PIXELS = 1 << 24
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # those that all kernels support


def make_views(
    batch: ImageBatch,
    policy: Policy,
    size: int,
    seed: int,
    epoch: int,
    dtype: torch.dtype = torch.float32,
    kernel: str = "auto",
    key_bytes: bool = False,
) -> tuple[Tensor, Tensor]:
    """(view_q, view_k) of `batch` under `policy`: each (B, 3, size, size), channels_last, normalised.

    dtype: one of DTYPES. kernel: auto, triton, numba or reference (`make_view`), see `choose_augment_kernel`; all give
    the same bits. key_bytes: view_k is uint8, for another rank, where `normalise_bytes` makes it the same. Raises
    ValueError for size < 1, for another dtype, for a kernel that cannot run, and for key_bytes with hide-and-seek,
    because no byte is 0 after normalisation, as hidden cells are.
    """
    _check_size(size)
    if dtype not in DTYPES:
        raise ValueError(f"views are made in {', '.join(map(str, DTYPES))}, not in {dtype}: convert them afterwards")
    if key_bytes and policy.hide_and_seek:
        raise ValueError("key_bytes and hide_and_seek exclude each other: leave one of them out")
    chosen, _ = choose_augment_kernel(batch.pixels.device, kernel)
    if chosen == "triton":
        return draw_views_fused(batch, policy, seed, epoch, size, dtype, key_bytes)
    dtypes = dtype, torch.uint8 if key_bytes else dtype
    params = sample_both(policy, batch, seed, epoch)
    if chosen == "numba":
        from fastssl.augment.compiled_views import make_views_compiled  # imports numba, which takes a second

        return make_views_compiled(batch, params, size, dtypes)
    view_q, view_k = (make_view(batch, p, size, d) for p, d in zip(params, dtypes))
    return view_q, view_k


def make_view(batch: ImageBatch, params: ViewParams, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """One view of every image: (B, 3, size, size), channels_last, normalised with ImageNet's mean and std.

    params: from `sample_params`, on the batch's device. With dtype uint8 the view is neither normalised nor hidden.
    Raises ValueError for size < 1.
    """
    out = _empty_view(batch, size, dtype)
    step = _images_at_once(batch, size)
    plans, taps = jitter_plan(params), gaussian_taps(params.sigma)
    for images, *part in zip(_split(batch, step), *(whole.split(step) for whole in (params, plans, taps, out))):
        _make_part(images, *part)
    return out


def _make_part(images: ImageBatch, p: ViewParams, plan: Tensor, taps: Tensor, view: Tensor) -> None:
    """Writes the views of some images into `view`."""
    x = _to_planes(crop_resize(images, p, view.shape[-1]))
    x = apply_where(p.grey_before, x, update_greyscale)
    x = apply_jitter(x, plan, p)
    x = apply_where(p.grey_after, x, update_greyscale)
    x = apply_where(p.blur, x, update_blur, taps)
    x = apply_where(p.solarise, x, update_solarise)
    if view.dtype != torch.uint8:
        update_normalise(x)
        x = apply_where(p.hide_cells > 0, x, update_hide, p.hide_cells, p.hide_p, p.hide_key)
    view.copy_(x)


def make_crop_view(batch: ImageBatch, params: ViewParams, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """`make_view` for params that only crop and flip, with the same bits; it ignores all others.

    On a GPU `make_view` computes every operation for every image, because choosing would be a sync.
    """
    out = _empty_view(batch, size, dtype)
    step = _images_at_once(batch, size)
    for images, p, view in zip(_split(batch, step), params.split(step), out.split(step)):
        _write_normalised(crop_resize(images, p, size), view)
    return out


def make_eval_view(batch: ImageBatch, size: int, resize: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Resizes the short side to `resize` pixels, crops the centre and normalises: (B, 3, size, size), channels_last.

    Equals torchvision's Resize and CenterCrop on Pillow images to 1/255.
    Raises ValueError for size < 1, and for resize < size, where the crop would not fit into the image.
    """
    if resize < size:
        raise ValueError(
            f"an evaluation view of {size} pixels needs a short side of at least {size} pixels, got {resize}"
        )
    out = _empty_view(batch, size, dtype)
    step = _images_at_once(batch, size)
    for images, view in zip(_split(batch, step), out.split(step)):
        _write_normalised(eval_resize(images, size, resize), view)
    return out


def _write_normalised(x: Tensor, view: Tensor) -> None:
    """Writes x (C, 3, S, S) uint8 into `view`, normalised."""
    x = _to_planes(x)
    update_normalise(x)
    view.copy_(x)


def _to_planes(x: Tensor) -> Tensor:
    return x.to(torch.float32, memory_format=torch.contiguous_format)


def _check_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"the size of a view must be at least 1 pixel, got {size}")


def _empty_view(batch: ImageBatch, size: int, dtype: torch.dtype) -> Tensor:
    _check_size(size)
    shape = (batch.size, 3, size, size)
    return torch.empty(shape, dtype=dtype, device=batch.pixels.device, memory_format=torch.channels_last)


def _split(batch: ImageBatch, count: int) -> list[ImageBatch]:
    return [batch.select(slice(start, start + count)) for start in range(0, batch.size, count)]


def _images_at_once(batch: ImageBatch, size: int) -> int:
    if batch.pixels.device.type == "cpu":
        return 1 if size >= CPU_ALONE else max(1, CPU_PIXELS // size**2)
    return max(1, GPU_PIXELS // (size * max(size, batch.max_side)))
