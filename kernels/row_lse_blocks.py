"""Block sizes of the pass over the queue: a fixed table, so that every rank and run compiles the same kernel.

They were chosen from what the compiler makes of each candidate (`python -m fastssl.bench.compile_loss`): the largest
tiles without spilled registers, with two programs per multiprocessor where they fit, so that one computes exponentials
while the other keeps the tensor cores busy. `python -m fastssl.bench.sweep_loss` measures the candidates on a GPU and
prints lines for this table; the ones below are not yet from a sweep.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

DIMS = (32, 64, 128, 256)  # the feature dimensions the table knows


class Blocks(NamedTuple):
    """The block sizes of a program, and how many programs share a multiprocessor."""

    block_n: int  # rows of x per program
    block_k: int  # rows of the queue per tile
    num_warps: int
    num_stages: int  # tiles in flight
    programs_per_sm: int


# (family, bytes per element, number of scales) -> D -> blocks. Family 80 also serves GPUs with 99 KB of shared memory
# (8.6, 8.9, 12.x), where all its entries fit.
TABLE = {
    (80, 2, 1): {
        32: Blocks(128, 64, 4, 3, 2),
        64: Blocks(128, 64, 4, 3, 2),
        128: Blocks(128, 64, 8, 3, 1),
        256: Blocks(64, 32, 4, 2, 2),
    },
    (80, 2, 2): {
        32: Blocks(64, 64, 4, 3, 3),
        64: Blocks(64, 64, 4, 3, 2),
        128: Blocks(64, 32, 4, 3, 2),
        256: Blocks(64, 32, 8, 2, 1),
    },
    (80, 4, 1): {
        32: Blocks(64, 32, 4, 3, 4),
        64: Blocks(64, 32, 8, 2, 1),
        128: Blocks(32, 16, 8, 2, 2),
        256: Blocks(32, 16, 8, 2, 2),
    },
    (80, 4, 2): {
        32: Blocks(64, 32, 4, 3, 2),
        64: Blocks(64, 32, 8, 2, 1),
        128: Blocks(64, 32, 8, 2, 1),
        256: Blocks(32, 16, 8, 2, 1),
    },
    (90, 2, 1): {
        32: Blocks(128, 64, 4, 3, 2),
        64: Blocks(128, 64, 4, 3, 2),
        128: Blocks(64, 128, 4, 3, 2),
        256: Blocks(128, 64, 8, 2, 1),
    },
    (90, 2, 2): {
        32: Blocks(64, 64, 4, 3, 3),
        64: Blocks(64, 64, 4, 3, 3),
        128: Blocks(64, 64, 4, 3, 2),
        256: Blocks(64, 32, 8, 2, 1),
    },
    (90, 4, 1): {
        32: Blocks(64, 64, 4, 3, 3),
        64: Blocks(64, 64, 8, 3, 1),
        128: Blocks(32, 32, 8, 2, 1),
        256: Blocks(32, 32, 8, 2, 2),
    },
    (90, 4, 2): {
        32: Blocks(64, 32, 4, 3, 2),
        64: Blocks(64, 32, 8, 2, 1),
        128: Blocks(32, 32, 8, 2, 1),
        256: Blocks(32, 16, 8, 2, 1),
    },
    (100, 2, 1): {
        32: Blocks(64, 64, 4, 3, 3),
        64: Blocks(64, 64, 4, 3, 3),
        128: Blocks(128, 128, 8, 3, 1),
        256: Blocks(128, 64, 8, 2, 1),
    },
    (100, 2, 2): {
        32: Blocks(64, 64, 4, 3, 3),
        64: Blocks(64, 64, 4, 3, 3),
        128: Blocks(128, 64, 8, 3, 1),
        256: Blocks(64, 32, 8, 2, 1),
    },
    (100, 4, 1): {
        32: Blocks(64, 64, 4, 3, 3),
        64: Blocks(64, 64, 8, 3, 1),
        128: Blocks(32, 32, 8, 2, 1),
        256: Blocks(32, 32, 8, 2, 2),
    },
    (100, 4, 2): {
        32: Blocks(64, 32, 4, 3, 2),
        64: Blocks(64, 32, 8, 2, 1),
        128: Blocks(32, 32, 8, 2, 1),
        256: Blocks(32, 16, 8, 2, 1),
    },
}


def table_blocks(arch: int, dim: int, scales: int, itemsize: int) -> Blocks:
    """The entry of the table. arch: compute capability times ten (90 for an H200); itemsize: bytes per element."""
    return TABLE[family(arch), itemsize, scales][dim]


def family(arch: int) -> int:
    """The device family in the table that serves a compute capability (times ten)."""
    return {9: 90, 10: 100}.get(arch // 10, 80)


def capability(device: torch.device) -> int:
    """The device's compute capability times ten; the interpreter counts as 8.0."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def find_blocks(device: torch.device, dim: int, scales: int, itemsize: int) -> tuple[Blocks, int]:
    """(blocks for a kernel on this device, its number of multiprocessors); the interpreter counts as four."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    return table_blocks(capability(device), dim, scales, itemsize), multiprocessors
