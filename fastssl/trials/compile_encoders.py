"""torch.compile of the encoders on a GPU, with CUDA graphs where launching their kernels takes the host long.

A small encoder launches a thousand short kernels per step. The GPU then waits for the host, which competes for its
cores with the threads that read images. A CUDA graph is a single launch, but needs memory of its own.
"""

from __future__ import annotations

import gc
import math
import sys
import warnings

import torch

from fastssl.config import Config
from fastssl.distributed import Ranks, broadcast_object, gather_objects
from fastssl.machine.triton_device import compile_obstacle
from fastssl.moco import MoCo
from fastssl.plan import encoder_batch_size
from fastssl.trials.encoder_timing import (
    images_to_time,
    make_eager_iteration,
    make_iteration,
    measure_what_fits,
    time_iterations,
)
from fastssl.trials.inductor_options import inductor_options

HOW_NAMES = {"off": "not compiled", "on": "compiled", "graphs": "compiled, as CUDA graphs"}
FEW = 8  # images: so few that the GPU is done before the host has launched the next kernel
# Graphs are tried when launching takes this share of an eager iteration. Compiled iterations are shorter, and each of
# their kernels costs the host as much.
HOST_BOUND = 0.5
MARGIN = 1.1  # eager must be this many times as fast: timings are noisy, and compiled encoders need less memory


def compile_encoders(config: Config, moco: MoCo, ranks: Ranks) -> tuple[str, str]:
    """Compiles both encoders in place, so that the weights keep their names. Returns (a key of HOW_NAMES, why).

    Call on all ranks, before DDP wraps encoder_q; all get the same answer. Measuring leaves weights, buffers and the
    random state as they were. Raises ValueError when what was requested cannot be done.
    """
    requested, cuda = config.train.compile, ranks.device.type == "cuda"
    if requested == "graphs" and not cuda:
        raise ValueError("--compile graphs needs a GPU, and this run is on a CPU: use --compile on")
    obstacles = gather_objects(compile_obstacle(ranks.device) if cuda and requested != "off" else None, ranks)
    obstacle = next(filter(None, obstacles), None)
    if requested != "auto":
        if obstacle:
            raise ValueError(f"--compile {requested} cannot compile ({obstacle}): use --compile off")
        how, why = requested, "requested"
    elif not cuda or obstacle:
        how, why = "off", obstacle or "no CUDA device"
    elif reason := why_no_graphs(config):
        how, why = "on", reason
    else:
        return choose_by_clock(config, moco, ranks)
    set_compiled(moco, how)
    return how, why


def why_no_graphs(config: Config) -> str:
    """Why CUDA graphs are not tried, or ""."""
    if config.train.deterministic:
        return "CUDA graphs are not timed in a deterministic run"
    if config.optim.accumulate > 1:  # a replay overwrites the gradients of the one before
        return "CUDA graphs do not work with --accumulate"
    if config.model.sync_bn:
        return "CUDA graphs are not tried with --sync-bn, which communicates inside the encoders"
    return ""


def choose_by_clock(config: Config, moco: MoCo, ranks: Ranks) -> tuple[str, str]:
    """Chooses graphs if launching an eager iteration takes the host long, and graphs work and are faster than that.

    Where they are not, the encoders are compiled only if that is not slower than eager: to launch a compiled kernel
    takes the host longer than one of torch's.
    """
    with torch.random.fork_rng([ranks.device]):
        launching, eager = broadcast_object(time_eager(config, moco, ranks), ranks)
        measured = f"measured at the start: eager {1e3 * eager:.3g} ms, of which launches {1e3 * launching:.3g} ms"
        if launching < HOST_BOUND * eager:
            set_compiled(moco, "on")
            return "on", measured
        if ranks.rank == 0:
            print("compiling the encoders to try CUDA graphs: minutes the first time", file=sys.stderr, flush=True)
        torch.cuda.empty_cache()  # graphs have memory of their own
        seconds, found = try_compiled("graphs", config, moco, ranks)
        measured += f", CUDA graphs {found}"
        if seconds < eager:
            return "graphs", measured
        forget_compiled(moco)
        how = "on"
        if config.model.bn_splits == 1:  # eager was timed without the splits, which are far slower there
            seconds, found = try_compiled("on", config, moco, ranks)
            measured += f", compiled {found}"
            how = "on" if seconds <= MARGIN * eager else "off"
    if how == "off" or ranks.world_size > 1:  # DDP has the encoder compiled in parts, to send gradients early
        forget_compiled(moco)
    if how == "on":
        set_compiled(moco, how)
    return how, measured


def set_compiled(moco: MoCo, how: str) -> None:
    """Sets how the encoders are compiled when they are next called; `how` is a key of HOW_NAMES."""
    for encoder in (moco.encoder_q, moco.encoder_k):
        if how != "off":
            encoder.compile(options=inductor_options(encoder, how))


def forget_compiled(moco: MoCo) -> None:
    """Makes the encoders run as they did before they were compiled, and frees what compiling them took."""
    for encoder in (moco.encoder_q, moco.encoder_k):
        encoder.compile(backend="eager", disable=True)
    torch.compiler.reset()  # frees the graphs' memory,
    gc.collect()  # and this what the frames of a failure hold in reference cycles


def time_eager(config: Config, moco: MoCo, ranks: Ranks) -> tuple[float, float]:
    """(seconds the host takes to launch an eager iteration, seconds of an iteration with all of a rank's images)."""

    def measure(images: int) -> dict[int, float]:
        sizes = {min(FEW, images), images}
        return time_iterations({n: make_eager_iteration(config, moco.encoder_q, n, moco.memory_format) for n in sizes})

    images, seconds = measure_what_fits(measure, images_to_time(config, ranks))
    return seconds[min(FEW, images)], seconds[images] * encoder_batch_size(config, ranks) / images


def try_compiled(how: str, config: Config, moco: MoCo, ranks: Ranks) -> tuple[float, str]:
    """Compiles the encoders in that way. Returns rank 0's seconds of an iteration and the same in words.

    If it fails on any rank, returns infinity and what went wrong. Raises ValueError when a failure leaves the GPU
    unusable.
    """
    buffers = [(b, b.clone()) for encoder in (moco.encoder_q, moco.encoder_k) for b in encoder.buffers()]
    set_compiled(moco, how)
    try:
        seconds, failure = time_compiled(config, moco, ranks), ""
    except Exception as error:  # the compiler and CUDA raise many kinds, and training works without
        seconds, failure = math.inf, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        moco.encoder_q.zero_grad()
    if failure:
        check_device(ranks.device, failure, {"graphs": "on", "on": "off"}[how])
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    results = gather_objects((seconds, failure), ranks)
    failure = next((failure for _, failure in results if failure), "")
    return (math.inf, f"failed: {failure}") if failure else (results[0][0], f"{1e3 * results[0][0]:.3g} ms")


def time_compiled(config: Config, moco: MoCo, ranks: Ranks) -> float:
    """Seconds of an iteration. Raises RuntimeError when torch skips a part, and whatever compiling it raises."""
    from torch._dynamo.utils import counters  # seconds to import, and only here

    device, skipped = ranks.device, counters["inductor"]["cudagraph_skips"]
    images = encoder_batch_size(config, ranks)
    iteration = make_iteration(config, moco.encoder_q, moco.encoder_k, images, moco.memory_format)

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()  # the results of earlier replays may be overwritten
        iteration()

    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    with warnings.catch_warnings(), torch.cuda.stream(stream):  # restores the stream after a failed capture
        warnings.filterwarnings("ignore", message="The CUDA Graph is empty")  # torch makes one for its memory pool
        # The first step compiles and runs in the graphs' memory, the second records, the others replay.
        seconds = time_iterations({"compiled": step}, warm_up=4)["compiled"]
    if counters["inductor"]["cudagraph_skips"] > skipped:
        raise RuntimeError("torch did not capture all of them; its log says why")
    return seconds


def check_device(device: torch.device, failure: str, instead: str) -> None:
    """Raises ValueError when a failure left the GPU, or torch's random numbers on it, unusable.

    Running out of memory does not. A CUDA error may: if it ends the capture of a graph, torch 2.11 believes that it is
    still capturing, and neither draws random numbers nor frees memory that another stream has used.
    """
    try:
        torch.rand(1, device=device).item()
    except RuntimeError as error:
        raise ValueError(f"compiling failed ({failure}) and left the GPU unusable: use --compile {instead}") from error
