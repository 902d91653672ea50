"""Block sizes of the pass over the queue: a literal table, so that every rank and run compiles the same kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch

DIMS = (32, 64, 128, 256)  # the feature dimensions the table knows


class Blocks(NamedTuple):
    """How one program of the kernel is cut and how many of them share a multiprocessor."""

    block_n: int  # rows of x held by a program
    block_k: int  # rows of the queue per tile
    num_warps: int
    num_stages: int  # tiles in flight
    programs_per_sm: int


def table_blocks(arch: int, dim: int, scales: int, itemsize: int) -> Blocks:
    return Blocks(64, 64, 4, 3, 1)


def find_blocks(device: torch.device, dim: int, scales: int, itemsize: int) -> tuple[Blocks, int]:
    """The blocks for a kernel on this device and its number of multiprocessors (the interpreter plays one of 4)."""
    if device.type != "cuda":
        return table_blocks(80, dim, scales, itemsize), 4
    properties = torch.cuda.get_device_properties(device)
    return table_blocks(
        properties.major * 10 + properties.minor, dim, scales, itemsize
    ), properties.multi_processor_count
