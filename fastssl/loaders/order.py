"""Which images form which batch: an order that all loaders share, as a pure function of (seed, epoch).

Global batch g of an epoch is `order[g * B * W : (g + 1) * B * W]`; rank r of W gets rows [r * B, (r + 1) * B) of it.
So W ranks with B images each see together, in rank order, exactly what one process with W * B images sees. The last
images of an epoch, too few for a global batch, are dropped, so that every rank makes the same number of steps.

For data sets larger than memory `Order("blocks")` keeps reads close together: blocks of consecutive images come in
random order, and images are shuffled within windows of WINDOW_BLOCKS blocks. All ranks read the same window.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastssl.plural import counted
from fastssl.random_key import STREAM_BLOCKS, STREAM_ORDER, permutation, random_bits

WINDOW_BLOCKS = 128  # blocks shuffled together: up to 128 classes even if each block holds only one


@dataclass(frozen=True)
class Order:
    """How an epoch is shuffled: "full", all orders equally likely, or "blocks", with reads that stay in a window.

    Raises ValueError for another shuffle, or a block size below 1.
    """

    shuffle: str = "full"
    block_size: int = 128  # consecutive images that are read together

    def __post_init__(self) -> None:
        if self.shuffle not in ("full", "blocks"):
            raise ValueError(f"--shuffle must be 'full' or 'blocks', got {self.shuffle!r}")
        if self.block_size < 1:
            raise ValueError(f"--block-size must be at least 1, got {self.block_size}")


FULL = Order()


def epoch_order(
    num_images: int, seed: int, epoch: int, device: torch.device | str = "cpu", order: Order = FULL
) -> Tensor:
    """The order of all images in an epoch: a permutation of range(num_images), (num_images,) int64."""
    if order.shuffle == "full":
        return permutation(seed, epoch, num_images, STREAM_ORDER, device)
    index = torch.arange(num_images, device=device)
    num_blocks = math.ceil(num_images / order.block_size)
    place = torch.argsort(permutation(seed, epoch, num_blocks, STREAM_BLOCKS, device))  # each block's in the epoch
    window = place[index // order.block_size] // WINDOW_BLOCKS
    words = random_bits(seed, epoch, index, STREAM_ORDER, 1)[:, 0]
    return torch.argsort((window << 32) | words, stable=True)


def count_batches(num_images: int, batch_size: int, world_size: int = 1) -> int:
    """Batches per epoch on each rank; `batch_size` is per rank. Raises ValueError when not even one batch is full."""
    if batch_size < 1:
        raise ValueError(f"the batch size must be at least 1, got {batch_size}")
    if num_images < batch_size * world_size:
        ranks = f" on each of {world_size} ranks" if world_size > 1 else ""
        most = num_images // world_size * world_size
        fix = f"use a batch size of at most {most:,}{' in all' if ranks else ''}" if most else "use fewer ranks"
        raise ValueError(
            f"the data set has {counted(num_images, 'image')} but a step takes {batch_size * world_size:,} (batch size "
            f"{batch_size:,}{ranks}): {fix}"
        )
    return num_images // (batch_size * world_size)


def batch_share(order: Tensor, step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> Tensor:
    """One rank's indices, (batch_size,), in global batch `step` of an epoch with this order."""
    start = (step * world_size + rank) * batch_size
    return order[start : start + batch_size]


def train_shares(
    num_images: int,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    first: int = 0,
    device: torch.device | str = "cpu",
    order: Order = FULL,
) -> Iterator[Tensor]:
    """One rank's indices of the batches first, first + 1, ... without end, (batch_size,) int64 each.

    Raises ValueError as `count_batches` does.
    """
    assert first >= 0
    steps = count_batches(num_images, batch_size, world_size)
    first_epoch, first_step = divmod(first, steps)
    for epoch in itertools.count(first_epoch):
        indices = epoch_order(num_images, seed, epoch, device, order)
        for step in range(first_step if epoch == first_epoch else 0, steps):
            yield batch_share(indices, step, batch_size, rank, world_size)


def eval_shares(
    num_images: int, batch_size: int, rank: int = 0, world_size: int = 1, limit: int | None = None
) -> Iterator[Tensor]:
    """`eval_share` in batches of `batch_size`, of which the last may be smaller; none if the rank has no images."""
    share = eval_share(num_images, rank, world_size, limit)
    return (share[start : start + batch_size] for start in range(0, len(share), batch_size))


def eval_share(num_images: int, rank: int = 0, world_size: int = 1, limit: int | None = None) -> Tensor:
    """One rank's part of an evaluation: contiguous in file order, with every image on exactly one rank.

    The parts of all ranks, joined in rank order, are the whole; their sizes differ by at most one. limit: use only this
    many images, spread evenly over the file order (and so over the classes of a sorted folder); None: use all.
    Returns (n,) int64, ascending.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"an evaluation needs at least 1 image, got a limit of {limit}")
    count = num_images if limit is None else min(limit, num_images)
    chosen = torch.arange(count) * num_images // count
    return chosen[count * rank // world_size : count * (rank + 1) // world_size]
