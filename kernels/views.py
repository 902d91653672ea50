"""Both views of a batch in three launches: `views_crop.py`, `views_jitter.py`, `views_finish.py`.

Between the launches a view is three planes of bytes, since every operation ends in whole numbers 0..255, as in the
Pillow pipelines it reproduces. So the result has the same bits as the PyTorch chain in `fastssl/augment/views.py`.
There are three launches because contrast needs the mean of the whole image, and a blur needs neighbouring pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .launching import on_device_of
from .views_crop import crop_tiles
from .views_finish import finish_tiles
from .views_jitter import jitter_rows
from .views_table import FLOAT_FIELDS, INT_FIELDS, NUM_TAPS, POLICY_FIELDS

OPTIONS = {"enable_fp_fusion": False}  # so that the few float64 steps round as PyTorch's do


class Launch(NamedTuple):
    """How the work of the three launches is cut into programs."""

    tile: int = 8  # side of a square tile in pixels, in launches one and three
    tiles: int = 49  # tiles per program of launch one, which draws a view's parameters once for all of them
    row_pixels: int = 4096  # about how many pixels a program of launch two takes, in whole rows
    block: int = 1024  # how many of them at a time
    warps: tuple[int, int, int] = (1, 8, 1)  # per program, for each launch


# The interpreter runs programs one after the other, so few and large ones are best.
COMPILED, INTERPRETED = Launch(), Launch(tile=64, tiles=1 << 20, row_pixels=1 << 20, block=1 << 14)


class Windows(NamedTuple):
    """The images of a batch: the fields of `ImageBatch` that the kernels need."""

    pixels: Tensor  # (P,) uint8
    offset: Tensor  # (B,) int64
    height: Tensor  # (B,) int32
    width: Tensor  # (B,) int32
    index: Tensor  # (B,) int64


class Tables(NamedTuple):
    """The parameters of N views; see `views_table.py`."""

    ints: Tensor  # (N, INTS) int32
    floats: Tensor  # (N, FLOATS) float32


class Draw(NamedTuple):
    """What determines the random parameters of the views."""

    policy: Tensor  # (POLICY_FIELDS,) float64
    seed: int  # in [-2^63, 2^63)
    epoch: int  # in [0, 2^32)


def empty_tables(windows: Windows) -> Tables:
    """Tables for both views of every image, to be filled by launch one."""
    num = 2 * len(windows.offset)
    floats = windows.pixels.new_empty(num, len(FLOAT_FIELDS), dtype=torch.float32)
    return Tables(windows.width.new_empty(num, len(INT_FIELDS)), floats)


def views_triton(
    windows: Windows,
    tables: Tables,
    draw: Draw | None,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    key_bytes: bool = False,
) -> tuple[Tensor, Tensor]:
    """view_q and view_k of B images, each (B, S, S, 3) in `dtype` (float32, float16, bfloat16).

    draw: from what to draw the parameters, which are written to `tables`; None if `tables` already holds them. mean,
    std: per channel, of values in 0..1. key_bytes: view_k is uint8, neither normalised nor hidden. Sigmas are at most 2
    pixels. Does not wait for the device.
    """
    pixels, (ints, floats) = windows.pixels, tables
    num = ints.shape[0]
    assert ints.shape[1] == len(INT_FIELDS) and floats.shape == (num, len(FLOAT_FIELDS))
    assert num == 2 * len(windows.offset)
    assert all(t.is_contiguous() for t in (*windows, *tables)), "the kernels read whole rows"
    policy, seed, epoch = draw or Draw(floats.new_empty(0, dtype=torch.float64), 0, 0)
    assert draw is None or policy.shape == (len(POLICY_FIELDS),)
    batch = num // 2
    out = pixels.new_empty(batch if key_bytes else num, size, size, 3, dtype=dtype)
    keys = pixels.new_empty(batch, size, size, 3) if key_bytes else None
    views = out[:batch], out[batch:] if keys is None else keys
    if num == 0:
        return views
    cut = COMPILED if pixels.is_cuda else INTERPRETED
    tiles = triton.cdiv(size, cut.tile) ** 2
    planes = pixels.new_empty(num, 3, size, size)
    rows = pixels.new_empty(num, 3, size, size, dtype=torch.int16)
    luma, taps = ints.new_empty(num, tiles), floats.new_empty(num, NUM_TAPS)
    rows_per_program = max(1, cut.row_pixels // size)
    with on_device_of(pixels):
        crop_tiles[(triton.cdiv(tiles, cut.tiles), num)](
            *windows,
            policy,
            ints,
            floats,
            planes,
            luma,
            taps,
            seed,
            epoch,
            batch,
            size,
            tiles,
            cut.tiles,
            DRAW=draw is not None,
            BLOCK=cut.tile,
            num_warps=cut.warps[0],
            **OPTIONS,
        )
        jitter_rows[(triton.cdiv(size, rows_per_program), num)](
            planes,
            rows,
            luma,
            taps,
            ints,
            floats,
            size,
            tiles,
            rows_per_program,
            BLOCK=cut.block,
            BLOCK_TILES=triton.next_power_of_2(tiles),
            num_warps=cut.warps[1],
            **OPTIONS,
        )
        finish_tiles[(tiles, num)](
            planes,
            rows,
            taps,
            ints,
            floats,
            out,
            keys,
            size,
            *means_and_scales(mean, std),
            BLOCK=cut.tile,
            num_warps=cut.warps[2],
            **OPTIONS,
        )
    return views


def means_and_scales(mean: Sequence[float], std: Sequence[float]) -> list[float]:
    """Three means and three scales with normalised = (byte - mean) * scale, from the mean and std of values in 0..1."""
    return [255 * m for m in mean] + [1 / (255 * s) for s in std]
