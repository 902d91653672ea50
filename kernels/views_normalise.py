"""Normalises views that came from another rank as bytes, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import on_device_of
from .views import OPTIONS, means_and_scales

BLOCK, WARPS = 4096, 4


@triton.jit
def normalise_rows(
    bytes_ptr,  # (B, ROW) uint8
    out_ptr,  # (B, ROW) float32, float16 or bfloat16, result
    row,  # values of a view: 3 S^2
    plane,  # distance from a value to the same pixel's next channel: 1 in channels_last, S^2 in planes
    # normalised = (byte - mean) * scale, channel by channel
    mean0,
    mean1,
    mean2,
    scale0,
    scale1,
    scale2,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK values of one view."""
    start = tl.program_id(1).to(tl.int64) * row
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = at // plane % 3
    mean = tl.where(channel == 0, mean0, tl.where(channel == 1, mean1, mean2))
    scale = tl.where(channel == 0, scale0, tl.where(channel == 1, scale1, scale2))
    value = tl.load(bytes_ptr + start + at, mask=at < row, other=0).to(tl.float32)
    tl.store(out_ptr + start + at, ((value - mean) * scale).to(out_ptr.dtype.element_ty), mask=at < row)


def normalise_triton(x: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Normalises x (B, 3, S, S) uint8, contiguous or channels_last, as `views_triton` does: same layout, in `dtype`.

    mean, std: per channel, of values in 0..1. B is at most 65,535. Does not wait for the device.
    """
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    rows = x.permute(0, 2, 3, 1) if channels_last else x  # in the order of memory
    assert rows.dtype == torch.uint8 and rows.is_contiguous()
    out = torch.empty_like(rows, dtype=dtype)
    if x.numel() > 0:
        pixels = x[0, 0].numel()
        plane = 1 if channels_last else pixels
        with on_device_of(x):
            normalise_rows[(triton.cdiv(3 * pixels, BLOCK), len(x))](
                rows, out, 3 * pixels, plane, *means_and_scales(mean, std), BLOCK=BLOCK, num_warps=WARPS, **OPTIONS
            )
    return out.permute(0, 3, 1, 2) if channels_last else out
