"""How a pass over the queue is cut up and in which number formats it computes."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from functools import cache

import torch

from .row_lse_blocks import Blocks

_FP16_MAX_SCALE = 10.0  # 2^15 exp(-2 * 10) is still a normal number in float16


@cache
def split_queue(num: int, num_keys: int, blocks: Blocks, multiprocessors: int) -> tuple[int, int]:
    """How many parts the queue is cut into, and keys per part (a multiple of the tile), to fill the device.

    The fewest parts among those with the least work on the busiest multiprocessor, a program's start and end counted
    as one tile.
    """
    row_blocks, tiles = _ceil_div(num, blocks.block_n), _ceil_div(num_keys, blocks.block_k)
    places = multiprocessors * blocks.programs_per_sm
    parts = min(
        range(1, min(tiles, places) + 1),
        key=lambda parts: _ceil_div(row_blocks * parts, places) * (_ceil_div(tiles, parts) + 1),
    )
    tiles_per_part = _ceil_div(tiles, parts)
    return _ceil_div(tiles, tiles_per_part), tiles_per_part * blocks.block_k


def weights_need_float32(scales: Sequence[float], dtype: torch.dtype) -> bool:
    """Whether the second product takes its operands in float32 because weights could leave float16's range."""
    return dtype == torch.float16 and max(scales) > _FP16_MAX_SCALE


def weight_factors(scale: float, dtype: torch.dtype, widen: bool) -> tuple[float, float]:
    """(a, b) with weight = exp2(a dot - b) = exp(scale (dot - 1)) up to a factor that keeps it in range.

    |dot| <= 1 for unit rows. In float32 and bfloat16 the weight lies between exp(-87) and exp(75), in float16 between
    2^15 exp(-20), a normal number, and 2^15. Both numbers are float32 values, as the kernel takes them, so that who
    undoes the shift undoes it exactly.
    """
    factor = _float32(scale / math.log(2))
    if dtype == torch.float16 and not widen:
        return factor, _float32(factor - 15)
    return factor, min(factor, _float32(87 / math.log(2) - factor))


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _float32(number: float) -> float:
    return struct.unpack("f", struct.pack("f", number))[0]


def dot_precision() -> str:
    """How float32 operands are multiplied: TF32 if the user has allowed PyTorch to, else in full."""
    matmul = torch.backends.cuda.matmul
    # torch 2.9 named it anew, and refuses to answer by the old names once the new one was set
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if allowed else "ieee"
