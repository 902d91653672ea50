"""Times encoder iterations on random views at the start of a run, to choose their memory format and compilation."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Hashable
from statistics import median
from typing import TypeVar

import torch
from torch import nn

from fastssl.config import Config
from fastssl.distributed import Ranks
from fastssl.machine.precision import compute_dtype
from fastssl.models.batchnorm import split_batchnorm
from fastssl.plan import encoder_batch_size

ROUNDS = 3
# Pixels in a measurement, at most: a whole batch can take minutes on a CPU and, uncompiled, more memory than a step on
# a GPU. Bounding pixels, not images, gives small images enough work for the layout of activations to matter.
MOST_PIXELS = {"cpu": 128 * 64 * 64, "cuda": 256 * 224 * 224}
FEWEST = 4  # images in a measurement, unless a batch has fewer
Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


def images_to_time(config: Config, ranks: Ranks) -> int:
    """Images in a measurement: those of a forward pass, or as many of them as MOST_PIXELS allows."""
    most = max(FEWEST, MOST_PIXELS[ranks.device.type] // config.augment.image_size**2)
    return min(encoder_batch_size(config, ranks), most)


def measure_what_fits(measure: Callable[[int], Result], images: int) -> tuple[int, Result]:
    """(n, measure(n)) with n = `images`, halved until the GPU's memory suffices.

    What is measured is not compiled, and may need more memory than training does.
    """
    while True:
        try:
            return images, measure(images)
        except torch.OutOfMemoryError:
            if images < 2 * FEWEST:
                raise
        images //= 2
        gc.collect()
        torch.cuda.empty_cache()


def make_iteration(
    config: Config, encoder_q: nn.Module, encoder_k: nn.Module, images: int, layout: torch.memory_format
) -> Callable[[], None]:
    """A function that does the encoders' part of a training step on random views, and waits for the device.

    That is encoder_k forward, then encoder_q forward and backward.
    """
    device, size = next(encoder_q.parameters()).device, config.augment.image_size
    dtype = compute_dtype(config.train.precision, device)
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
    """`make_iteration` with an uncompiled copy of `encoder` in that layout; the encoder itself stays as it is."""
    model = copy.deepcopy(encoder).to(memory_format=layout)
    split_batchnorm(model, 1)  # split BN is far slower uncompiled, and the choice depends on the convolutions
    return make_iteration(config, model, model, images, layout)


def time_iterations(
    iterations: dict[Key, Callable[[], None]], rounds: int = ROUNDS, warm_up: int = 1
) -> dict[Key, float]:
    """The median seconds of each function. The warm-up rounds allocate, compile, and let cuDNN choose its kernels."""
    seconds: dict[Key, list[float]] = {key: [] for key in iterations}
    for turn in range(warm_up + rounds):
        for key, iteration in iterations.items():
            start = time.perf_counter()
            iteration()
            if turn >= warm_up:
                seconds[key].append(time.perf_counter() - start)
    return {key: median(times) for key, times in seconds.items()}
