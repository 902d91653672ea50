"""MoCo's state: query and key encoders, the queue of past keys (He et al., arXiv 1911.05722).

The order of a step is in `fastssl.train`; here are its parts, each of which changes this state in place.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fastssl.models.batchnorm import take_counters
from fastssl.random_key import STREAM_QUEUE, derive_seed


class MoCo(nn.Module):
    """Owns encoder_q (trained), encoder_k (its moving average), the queue and its pointer."""

    queue: Tensor  # (K, D) unit rows, float32 or a 16-bit type
    queue_ptr: Tensor  # (1,) int64, where the next key goes

    def __init__(self, encoder_q: nn.Module, dim: int, queue_size: int, seed: int) -> None:
        super().__init__()
        self.encoder_q = encoder_q
        self.encoder_k = copy.deepcopy(encoder_q).requires_grad_(False)
        generator = torch.Generator().manual_seed(derive_seed(seed, 0, STREAM_QUEUE))
        rows = torch.randn(queue_size, dim, generator=generator)
        self.register_buffer("queue", nn.functional.normalize(rows, dim=1))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))
        self.counters: list[Tensor] = []  # of batch norm's batches, where `take_counters` has run
        self.memory_format = torch.contiguous_format  # of the weights, and of the views they meet

    def set_memory_format(self, memory_format: torch.memory_format) -> None:
        """Lays the weights out as channels_last (NHWC) or contiguous (NCHW); numbers stay, up to rounding."""
        self.to(memory_format=memory_format)
        self.memory_format = memory_format

    def take_counters(self) -> None:
        """From now on `count_batch` counts for all layers, in one launch. After moves to another device."""
        self.counters = take_counters(self.encoder_q) + take_counters(self.encoder_k)

    def count_batch(self) -> None:
        """Both encoders have seen a batch."""
        if self.counters:
            torch._foreach_add_(self.counters, 1)

    @torch.no_grad()
    def update_key_encoder(self, ema_momentum: float) -> None:
        """theta_k <- m theta_k + (1 - m) theta_q, parameters only: batch norm's buffers are each encoder's own."""
        theta_k, theta_q = list(self.encoder_k.parameters()), list(self.encoder_q.parameters())
        torch._foreach_lerp_(theta_k, theta_q, 1.0 - ema_momentum)

    @torch.no_grad()
    def update_queue(self, keys: Tensor) -> None:
        """Writes keys (n, D) at the pointer, around the end; of more than K keys the last K stay."""
        queue_size, count = self.queue.shape[0], keys.shape[0]
        if count > queue_size:
            self.queue_ptr.add_(count - queue_size)
            keys = keys[-queue_size:]
        place = (self.queue_ptr + torch.arange(keys.shape[0], device=keys.device)) % queue_size
        self.queue.index_copy_(0, place, keys.to(self.queue.dtype))
        self.queue_ptr.add_(keys.shape[0]).remainder_(queue_size)
