"""Which images make which batch: one order for every loader, a pure function of (seed, epoch).

Global batch g of an epoch is `order[g * B * W : (g + 1) * B * W]`; rank r of W takes rows [r * B, (r + 1) * B) of it.
So W ranks with B images each see together, in rank order, exactly what one process with W * B images sees. The tail
that fills no global batch is dropped: every rank makes the same number of steps.

For a data set larger than memory `Order("blocks")` keeps reads near each other: blocks of consecutive images come in
random order, and the images of each window of WINDOW_BLOCKS blocks are mixed. All ranks read the same window.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.random_key import STREAM_BLOCKS, STREAM_ORDER, permutation, random_bits

WINDOW_BLOCKS = 128  # blocks that are mixed with each other: as many classes meet even where a block holds one


class Order(NamedTuple):
    """How an epoch is shuffled. full: every order is equally likely; blocks: reads stay within a window."""

    shuffle: str = "full"
    block_size: int = 128  # consecutive images that are read together

    def check(self) -> Order:
        """Itself; raises ValueError for an order there is not."""
        if self.shuffle not in ("full", "blocks"):
            raise ValueError(f"--shuffle must be 'full' or 'blocks', got {self.shuffle!r}")
        if self.block_size < 1:
            raise ValueError(f"--block-size must be at least 1, got {self.block_size}")
        return self


FULL = Order()


def epoch_order(
    num_images: int, seed: int, epoch: int, device: torch.device | str = "cpu", order: Order = FULL
) -> Tensor:
    """The order of all images in one epoch: a permutation of range(num_images), (num_images,) int64."""
    if order.shuffle == "full":
        return permutation(seed, epoch, num_images, STREAM_ORDER, device)
    index = torch.arange(num_images, device=device)
    num_blocks = -(-num_images // order.block_size)
    place = torch.argsort(permutation(seed, epoch, num_blocks, STREAM_BLOCKS, device))  # of each block in the epoch
    window = place[index // order.block_size] // WINDOW_BLOCKS
    words = random_bits(seed, epoch, index, STREAM_ORDER, 1)[:, 0]
    return torch.argsort((window << 32) | words, stable=True)


def count_batches(num_images: int, batch_size: int, world_size: int = 1) -> int:
    """Batches per epoch and rank; `batch_size` is per rank.

    Raises ValueError when the data set is smaller than one global batch.
    """
    if batch_size < 1:
        raise ValueError(f"the batch size must be at least 1, got {batch_size}")
    if num_images < batch_size * world_size:
        ranks = f" on each of {world_size} ranks" if world_size > 1 else ""
        most = num_images // world_size
        raise ValueError(
            f"the data set has {num_images:,} images but one step takes {batch_size * world_size:,} (batch size "
            f"{batch_size:,}{ranks}): " + (f"use a batch size of at most {most:,}" if most else "use fewer ranks")
        )
    return num_images // (batch_size * world_size)


def batch_share(order: Tensor, step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> Tensor:
    """The (batch_size,) indices of one rank in global batch `step` of an epoch whose order is `order`."""
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
    """One rank's indices of batch first, first + 1, ... without end; batch b belongs to epoch b // count_batches.

    Each is (batch_size,) int64. Raises ValueError as `count_batches`.
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
    """`eval_share` in batches of `batch_size`, the last one smaller; none when the rank has no images."""
    share = eval_share(num_images, rank, world_size, limit)
    return (share[start : start + batch_size] for start in range(0, len(share), batch_size))


def eval_share(num_images: int, rank: int = 0, world_size: int = 1, limit: int | None = None) -> Tensor:
    """One rank's part of an evaluation: contiguous in file order, every image on exactly one rank, tail included.

    Ranks' parts joined in rank order are the whole, and their sizes differ by one at most. `limit` takes that many
    images evenly spread over the file order (so over the classes of a sorted folder); None or more than there are
    takes all. Returns (n,) int64, ascending.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"an evaluation needs at least 1 image, got a limit of {limit}")
    count = num_images if limit is None else min(limit, num_images)
    chosen = torch.arange(count) * num_images // count
    return chosen[count * rank // world_size : count * (rank + 1) // world_size]
