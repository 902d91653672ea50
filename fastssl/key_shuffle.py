"""MoCo's key shuffle among ranks (He et al., arXiv 1911.05722, section 3.3), and the keys back in rank order.

The shuffle moves images between ranks by a permutation of the global batch that every rank computes for itself, so none
is broadcast. Images travel as uint8 and are normalised on arrival (`normalise_bytes`), except with hide-and-seek (see
`make_views`).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastssl.distributed import Ranks, gather_rows


def shuffle_rows(x: Tensor, permutation: Tensor, ranks: Ranks) -> Tensor:
    """Permutes the rows of the global batch: row j of the result, counted over all ranks, is row permutation[j] of x.

    x: (B, C, H, W) on each rank, any dtype, contiguous or channels_last; the result has the same layout. permutation:
    (W * B,) int64 on the CPU, the same on every rank. Each row is sent once, to the rank that needs it (all-to-all).
    """
    size = x.shape[0]
    mine = slice(ranks.rank * size, (ranks.rank + 1) * size)
    if ranks.world_size == 1:
        return x[to_device(permutation, x.device)]
    places = torch.argsort(permutation)[mine]  # where my rows go
    send_order = torch.argsort(places)
    send_to = places[send_order] // size
    source = permutation[mine] // size
    send_counts = torch.bincount(send_to, minlength=ranks.world_size).tolist()
    receive_counts = torch.bincount(source, minlength=ranks.world_size).tolist()

    nhwc = x.is_contiguous(memory_format=torch.channels_last)
    rows = (x.permute(0, 2, 3, 1) if nhwc else x)[to_device(send_order, x.device)].contiguous()
    received = torch.empty_like(rows)
    # as bytes, because not every backend sends every dtype
    dist.all_to_all_single(as_bytes(received), as_bytes(rows), receive_counts, send_counts)
    arrived_at = torch.argsort(torch.argsort(source, stable=True))  # rows arrive ordered by source rank, then by place
    result = received[to_device(arrived_at, x.device)]
    return result.permute(0, 3, 1, 2) if nhwc else result


def unshuffle_keys(k: Tensor, permutation: Tensor, ranks: Ranks) -> Tensor:
    """Undoes `shuffle_rows` for keys: shuffled (B, D) on each rank -> all keys (W * B, D) in their original order."""
    return gather_rows(k, ranks)[to_device(torch.argsort(permutation), k.device)]


def in_rank_order(keys: list[Tensor], world_size: int) -> Tensor:
    """The keys of all micro-batches, each (W * B, D) in rank order, joined rank by rank as if from a single batch."""
    return torch.stack(keys).unflatten(1, (world_size, -1)).transpose(0, 1).flatten(0, 2)


def to_device(index: Tensor, device: torch.device) -> Tensor:
    """Copies a small host tensor to the device without a sync."""
    return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index


def as_bytes(x: Tensor) -> Tensor:
    """A contiguous (B, ...) tensor viewed as (B, bytes) uint8."""
    return x.view(x.shape[0], -1).view(torch.uint8)
