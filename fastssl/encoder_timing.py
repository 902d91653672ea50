"""Iterations of the encoders on random views, timed in turn: what decides at the start of a run how they are run."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Hashable
from statistics import median
from typing import TypeVar

import torch
from torch import nn

from fastssl.config import Config
from fastssl.distributed import Ranks
from fastssl.models.batchnorm import split_batchnorm
from fastssl.plan import DTYPES, choose_precision, encoder_batch_size

ROUNDS = 3
# Pixels of a measurement: on a CPU a whole batch can take minutes, on a GPU, not compiled, more memory than a step.
# Small images want a larger part of their batch: with few, the weights' own layout decides, which steps hardly feel.
MOST_PIXELS = {"cpu": 128 * 64 * 64, "cuda": 256 * 224 * 224}
Key = TypeVar("Key", bound=Hashable)


def images_to_time(config: Config, ranks: Ranks) -> int:
    """Images of a forward pass, or as many of them as a measurement takes."""
    most = max(4, MOST_PIXELS[ranks.device.type] // config.augment.image_size**2)
    return min(encoder_batch_size(config, ranks), most)


def make_iteration(
    config: Config, encoder_q: nn.Module, encoder_k: nn.Module, images: int, layout: torch.memory_format
) -> Callable[[], None]:
    """k forward, q forward and backward, as in a training step, on the same random views, until the device is done."""
    device, size = next(encoder_q.parameters()).device, config.augment.image_size
    dtype = DTYPES[choose_precision(config.train.precision, device)]
    view = torch.randn(images, 3, size, size, device=device, dtype=dtype).contiguous(memory_format=layout)

    def iteration() -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            with torch.no_grad():
                encoder_k(view)
            z = encoder_q(view)
        z.float().square().sum().backward()
        encoder_q.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return iteration


def make_eager_iteration(
    config: Config, encoder: nn.Module, images: int, layout: torch.memory_format
) -> Callable[[], None]:
    """The same by a copy of `encoder` in that layout, not compiled; the encoder stays as it is."""
    model = copy.deepcopy(encoder).to(memory_format=layout)
    split_batchnorm(model, 1)  # in pieces it costs far more than compiled, and the convolutions decide
    return make_iteration(config, model, model, images, layout)


def time_in_turn(iterations: dict[Key, Callable[[], None]], warm_up: int = 1) -> dict[Key, float]:
    """Median seconds of each. In the warm-up it allocates, compiles, and lets cuDNN choose its kernels."""
    seconds: dict[Key, list[float]] = {key: [] for key in iterations}
    for turn in range(-warm_up, ROUNDS):
        for key, iteration in iterations.items():
            start = time.perf_counter()
            iteration()
            seconds[key] += [time.perf_counter() - start] * (turn >= 0)
    return {key: median(times) for key, times in seconds.items()}
