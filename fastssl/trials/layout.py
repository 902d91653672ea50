"""The memory format of the encoders, NHWC or NCHW: whichever is faster in a few iterations at the start of a run."""

from __future__ import annotations

import torch
from torch import nn

from fastssl.config import Config
from fastssl.distributed import Ranks, broadcast_object
from fastssl.machine.precision import imitated
from fastssl.trials.encoder_timing import images_to_time, make_eager_iteration, measure_what_fits, time_iterations

LAYOUT_NAMES = {torch.channels_last: "channels_last", torch.contiguous_format: "contiguous"}
USUAL = torch.channels_last  # what 16-bit convolutions want, on GPUs and on CPUs
MARGIN = 1.1  # the other must be this many times as fast: timings are noisy, and a restart should choose the same


def choose_layout(config: Config, encoder: nn.Module, ranks: Ranks) -> tuple[torch.memory_format, str]:
    """The memory format for `encoder` and why, in a few words. Call on all ranks; all get the same answer.

    Measuring changes neither the encoder nor the random state. --deterministic does not measure: the layouts round
    differently, and timing must not decide what such a run computes.
    """
    requested = config.train.channels_last
    if requested != "auto":
        return torch.channels_last if requested == "on" else torch.contiguous_format, "requested"
    if config.train.deterministic:
        return USUAL, "not measured in a deterministic run"
    # Measuring takes minutes there. Tried once: NHWC is faster for ResNet-18 and MobileNetV3-S, as fast for DeiT-Tiny.
    if imitated(config.train.precision, ranks.device):
        return USUAL, "not measured, since bf16 is slow here"
    with torch.random.fork_rng([ranks.device] if ranks.device.type == "cuda" else []):
        seconds = time_layouts(config, encoder, ranks)
    nhwc, nchw = broadcast_object([seconds[torch.channels_last], seconds[torch.contiguous_format]], ranks)
    chosen = torch.contiguous_format if nchw * MARGIN < nhwc else USUAL
    return chosen, f"measured at the start: channels_last {1e3 * nhwc:.3g} ms, contiguous {1e3 * nchw:.3g} ms"


def time_layouts(config: Config, encoder: nn.Module, ranks: Ranks) -> dict[torch.memory_format, float]:
    """Seconds of an iteration in each layout, timed in turn."""

    def measure(images: int) -> dict[torch.memory_format, float]:
        return time_iterations(
            {layout: make_eager_iteration(config, encoder, images, layout) for layout in LAYOUT_NAMES}
        )

    return measure_what_fits(measure, images_to_time(config, ranks))[1]
