"""The memory format of encoders, NHWC or NCHW: whichever a few iterations at the start of a run find faster."""

from __future__ import annotations

import torch
from torch import nn

from fastssl.config import Config
from fastssl.distributed import Ranks, broadcast_object
from fastssl.encoder_timing import images_to_time, make_eager_iteration, time_in_turn

LAYOUT_NAMES = {torch.channels_last: "channels_last", torch.contiguous_format: "contiguous"}
RULE = torch.channels_last  # what convolutions in 16 bits want, on GPUs and on CPUs
MARGIN = 1.1  # how many times as fast the other must be: clocks are noisy, and restarts should choose alike


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
    """Seconds of an iteration in each layout, in turn."""
    images = images_to_time(config, ranks)
    return time_in_turn({layout: make_eager_iteration(config, encoder, images, layout) for layout in LAYOUT_NAMES})
