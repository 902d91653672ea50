"""MoCo's state (He et al., arXiv 1911.05722): query encoder, key encoder and the queue of past keys.

`fastssl.train` defines the order of a step; the methods here are its parts, and change the state in place.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fastssl.models.batchnorm import take_counters
from fastssl.random_key import STREAM_QUEUE, derive_seed


class MoCo(nn.Module):
    """Owns encoder_q (trained), encoder_k (its moving average), the queue and the queue's pointer."""

    queue: Tensor  # (K, D) unit rows, float32 or a 16-bit type
    queue_ptr: Tensor  # (1,) int64, the row for the next key

    def __init__(self, encoder_q: nn.Module, dim: int, queue_size: int, seed: int) -> None:
        super().__init__()
        self.encoder_q = encoder_q
        self.encoder_k = copy.deepcopy(encoder_q).requires_grad_(False)
        generator = torch.Generator().manual_seed(derive_seed(seed, 0, STREAM_QUEUE))
        rows = torch.randn(queue_size, dim, generator=generator)
        self.register_buffer("queue", nn.functional.normalize(rows, dim=1))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))
        self.counters: list[Tensor] = []  # batch norm's num_batches_tracked, once `take_counters` was called
        self.memory_format = torch.contiguous_format  # of the weights and the views

    def set_memory_format(self, memory_format: torch.memory_format) -> None:
        """Lays the weights out as channels_last (NHWC) or contiguous (NCHW)."""
        self.to(memory_format=memory_format)
        self.memory_format = memory_format

    def take_counters(self) -> None:
        """Makes `count_batch` count for all batch norm layers in one launch. Call after moving to the device."""
        self.counters = take_counters(self.encoder_q) + take_counters(self.encoder_k)

    def count_batch(self) -> None:
        """Counts a batch that both encoders have seen."""
        if self.counters:
            torch._foreach_add_(self.counters, 1)

    @torch.no_grad()
    def update_key_encoder(self, ema_momentum: float) -> None:
        """theta_k <- m theta_k + (1 - m) theta_q. Only parameters: each encoder keeps its own batch norm buffers."""
        theta_k, theta_q = list(self.encoder_k.parameters()), list(self.encoder_q.parameters())
        torch._foreach_lerp_(theta_k, theta_q, 1.0 - ema_momentum)

    @torch.no_grad()
    def update_queue(self, keys: Tensor) -> None:
        """Writes keys (n, D) at the pointer, wrapping around at the end; of more than K keys, only the last K."""
        queue_size, count = self.queue.shape[0], keys.shape[0]
        if count > queue_size:
            self.queue_ptr.add_(count - queue_size)
            keys = keys[-queue_size:]
        rows = (self.queue_ptr + torch.arange(keys.shape[0], device=keys.device)) % queue_size
        self.queue.index_copy_(0, rows, keys.to(self.queue.dtype))
        self.queue_ptr.add_(keys.shape[0]).remainder_(queue_size)
