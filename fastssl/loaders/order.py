"""Which images make which batch: one order for every loader, a pure function of (seed, epoch).

Global batch g of an epoch is `order[g * B * W : (g + 1) * B * W]`; rank r of W takes rows [r * B, (r + 1) * B) of it.
So W ranks with B images each see together, in rank order, exactly what one process with W * B images sees. The tail
that fills no global batch is dropped: every rank makes the same number of steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from fastssl.random_key import STREAM_ORDER, permutation


def epoch_order(num_images: int, seed: int, epoch: int, device: torch.device | str = "cpu") -> Tensor:
    """The order of all images in one epoch: a permutation of range(num_images), (num_images,) int64."""
    return permutation(seed, epoch, num_images, STREAM_ORDER, device)


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
) -> Iterator[Tensor]:
    """One rank's indices of batch first, first + 1, ... without end; batch b belongs to epoch b // count_batches.

    Each is (batch_size,) int64. Raises ValueError as `count_batches`.
    """
    assert first >= 0
    steps = count_batches(num_images, batch_size, world_size)
    first_epoch, first_step = divmod(first, steps)
    for epoch in itertools.count(first_epoch):
        order = epoch_order(num_images, seed, epoch, device)
        for step in range(first_step if epoch == first_epoch else 0, steps):
            yield batch_share(order, step, batch_size, rank, world_size)


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
