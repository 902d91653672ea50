"""The memory format of encoders, NHWC or NCHW: whichever a few iterations at the start of a run find faster."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

from fastssl.config import Config
from fastssl.distributed import Ranks, broadcast_object
from fastssl.models.batchnorm import split_batchnorm
from fastssl.plan import DTYPES, choose_precision, rank_batch_size

LAYOUT_NAMES = {torch.channels_last: "channels_last", torch.contiguous_format: "contiguous"}
RULE = torch.channels_last  # what convolutions in 16 bits want, on GPUs and on CPUs
MARGIN = 1.1  # how many times as fast the other must be: clocks are noisy, and restarts should choose alike
ROUNDS = 3
# Pixels of a measurement: on a CPU a whole batch can take minutes, on a GPU, not compiled, more memory than a step.
# Small images want a larger part of their batch: with few, the weights' own layout decides, which steps hardly feel.
MOST_PIXELS = {"cpu": 128 * 64 * 64, "cuda": 256 * 224 * 224}


def choose_layout(config: Config, encoder: nn.Module, ranks: Ranks) -> tuple[torch.memory_format, str]:
    """The memory format for `encoder`, the same on every rank, and why in a few words. Call on all ranks.

    A measurement changes neither the encoder nor the random state. --deterministic takes the rule instead: layouts
    round differently, and no clock should decide what a run computes.
    """
    asked = config.train.channels_last
    if asked != "auto":
        return torch.channels_last if asked == "on" else torch.contiguous_format, "asked for"
    if config.train.deterministic:
        return RULE, "the rule of deterministic runs"
    with torch.random.fork_rng([ranks.device] if ranks.device.type == "cuda" else []):
        seconds = time_layouts(config, encoder, ranks)
    seconds = dict(zip(LAYOUT_NAMES, broadcast_object([seconds[layout] for layout in LAYOUT_NAMES], ranks)))
    other = next(layout for layout in LAYOUT_NAMES if layout != RULE)
    chosen = other if seconds[other] * MARGIN < seconds[RULE] else RULE
    told = ", ".join(f"{LAYOUT_NAMES[layout]} {1e3 * s:.3g} ms" for layout, s in seconds.items())
    return chosen, f"measured at the start: {told}"


def time_layouts(config: Config, encoder: nn.Module, ranks: Ranks) -> dict[torch.memory_format, float]:
    """Seconds of q forward and backward and k forward on random views, in each layout, in turn."""
    device, size = ranks.device, config.augment.image_size
    dtype = DTYPES[choose_precision(config.train.precision, device)]
    batch = min(rank_batch_size(config, ranks) // config.optim.accumulate, max(4, MOST_PIXELS[device.type] // size**2))

    def iteration(layout: torch.memory_format) -> Callable[[], None]:
        model = copy.deepcopy(encoder).to(memory_format=layout)
        split_batchnorm(model, 1)  # in pieces it costs far more than compiled, and the convolutions decide
        view = torch.randn(batch, 3, size, size, device=device, dtype=dtype).contiguous(memory_format=layout)

        def run() -> None:
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                z = model(view)
                with torch.no_grad():
                    model(view)
            z.float().square().sum().backward()
            model.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        run()  # allocates, and lets cuDNN choose its kernels
        return run

    runs, seconds = {layout: iteration(layout) for layout in LAYOUT_NAMES}, {layout: [] for layout in LAYOUT_NAMES}
    for _ in range(ROUNDS):
        for layout, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[layout].append(time.perf_counter() - start)
    return {layout: median(times) for layout, times in seconds.items()}
