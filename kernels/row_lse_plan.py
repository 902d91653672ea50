"""Decides into how many parts a pass cuts the queue, and in which number formats it computes."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from functools import cache

import torch
from triton import cdiv

from .row_lse_blocks import Blocks

_FP16_MAX_SCALE = 10.0  # 2^15 exp(-2 * 10) is still a normal number in float16


@cache
def split_queue(num: int, num_keys: int, blocks: Blocks, multiprocessors: int) -> tuple[int, int]:
    """(number of parts, keys per part, a multiple of the tile) that fill the device.

    Of the numbers with the least work on the busiest multiprocessor, it is the smallest; a program's start and end
    count as one tile.
    """
    row_blocks, tiles = cdiv(num, blocks.block_n), cdiv(num_keys, blocks.block_k)
    places = multiprocessors * blocks.programs_per_sm
    parts = min(
        range(1, min(tiles, places) + 1),
        key=lambda parts: cdiv(row_blocks * parts, places) * (cdiv(tiles, parts) + 1),
    )
    tiles_per_part = cdiv(tiles, parts)
    return cdiv(tiles, tiles_per_part), tiles_per_part * blocks.block_k


def weights_need_float32(scales: Sequence[float], dtype: torch.dtype) -> bool:
    """Whether the second product needs float32 operands, because the weights could leave the range of float16."""
    return dtype == torch.float16 and max(scales) > _FP16_MAX_SCALE


def weight_factors(scale: float, dtype: torch.dtype, widen: bool) -> tuple[float, float]:
    """(a, b) such that exp2(a dot - b) is exp(scale (dot - 1)) times a factor that keeps the weight in range.

    |dot| <= 1 for unit rows. In float32 and bfloat16 the weight lies between exp(-87) and exp(75), in float16 between
    2^15 exp(-20), a normal number, and 2^15. a and b are float32 values, which the kernel uses as they are, so that the
    shift can be undone exactly.
    """
    factor = _float32(scale / math.log(2))
    if dtype == torch.float16 and not widen:
        return factor, _float32(factor - 15)
    return factor, min(factor, _float32(87 / math.log(2) - factor))


def _float32(number: float) -> float:
    return struct.unpack("f", struct.pack("f", number))[0]


def dot_precision() -> str:
    """How float32 operands are multiplied: in TF32 if PyTorch is allowed to, else in full precision."""
    matmul = torch.backends.cuda.matmul
    # torch 2.9 renamed the setting, and raises for the old name once the new one has been set
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if allowed else "ieee"
