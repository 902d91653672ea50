"""torch.compile of the encoders on a GPU, with CUDA graphs where launching their kernels takes the host long.

A small encoder launches a thousand short kernels per step. The GPU then waits for the host, which competes for its
cores with the threads that read images. A CUDA graph is a single launch, but needs memory of its own.
"""

from __future__ import annotations

import gc
import sys
import warnings

import torch

from fastssl.config import Config
from fastssl.distributed import Ranks, broadcast_object, gather_objects
from fastssl.encoder_timing import images_to_time, make_eager_iteration, make_iteration, time_iterations
from fastssl.moco import MoCo
from fastssl.plan import encoder_batch_size

MODES = {"on": "default", "graphs": "reduce-overhead"}  # torch.compile's names
HOW_NAMES = {"off": "not compiled", "on": "compiled", "graphs": "compiled, as CUDA graphs"}
FEW = 8  # images: so few that the GPU is done before the host has launched the next kernel
# Graphs are tried when launching takes this share of an eager iteration. Compiled iterations are shorter, and each of
# their kernels costs the host as much.
HOST_BOUND = 0.5


def compile_encoders(config: Config, moco: MoCo, ranks: Ranks) -> tuple[str, str]:
    """Compiles both encoders in place, so that the weights keep their names. Returns (a key of HOW_NAMES, why).

    Call on all ranks, before DDP wraps encoder_q; all get the same answer. Measuring leaves weights, buffers and the
    random state as they were. Raises ValueError for graphs on a CPU.
    """
    requested, cuda = config.train.compile, ranks.device.type == "cuda"
    if requested == "graphs" and not cuda:
        raise ValueError("--compile graphs needs a GPU, and this run is on a CPU: use --compile on")
    if requested != "auto":
        how, why = requested, "requested"
    elif not cuda:
        how, why = "off", "no CUDA device"
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
    """Chooses graphs if launching an eager iteration takes the host long, and graphs work and are faster than that."""
    with torch.random.fork_rng([ranks.device]):
        launching, eager = broadcast_object(time_eager(config, moco, ranks), ranks)
        measured = f"measured at the start: eager {1e3 * eager:.3g} ms, of which launches {1e3 * launching:.3g} ms"
        if launching < HOST_BOUND * eager:
            set_compiled(moco, "on")
            return "on", measured
        if ranks.rank == 0:
            print("compiling the encoders to try CUDA graphs: minutes the first time", file=sys.stderr, flush=True)
        torch.cuda.empty_cache()  # graphs have memory of their own
        results = gather_objects(try_graphs(config, moco, ranks), ranks)
    seconds, failures = results[0][0], [failure for _, failure in results if failure]
    # No margin is asked for: code compiled without graphs is no faster than with them.
    if not failures and seconds < eager:
        return "graphs", f"{measured}, CUDA graphs {1e3 * seconds:.3g} ms"
    torch.compiler.reset()  # frees the graphs' memory,
    gc.collect()  # and this what the frames of a failure hold in reference cycles
    set_compiled(moco, "on")
    if failures:
        return "on", f"{measured}, CUDA graphs failed: {failures[0]}"
    return "on", f"{measured}, CUDA graphs {1e3 * seconds:.3g} ms"


def set_compiled(moco: MoCo, how: str) -> None:
    """Sets how the encoders are compiled when they are next called; `how` is a key of HOW_NAMES."""
    for encoder in (moco.encoder_q, moco.encoder_k):
        if how != "off":
            encoder.compile(mode=MODES[how])


def time_eager(config: Config, moco: MoCo, ranks: Ranks) -> tuple[float, float]:
    """(seconds the host takes to launch an eager iteration, seconds of an iteration with all of a rank's images)."""
    batch, most = encoder_batch_size(config, ranks), images_to_time(config, ranks)
    few = min(FEW, most)
    seconds = time_iterations(
        {n: make_eager_iteration(config, moco.encoder_q, n, moco.memory_format) for n in {few, most}}
    )
    return seconds[few], seconds[most] * batch / most


def try_graphs(config: Config, moco: MoCo, ranks: Ranks) -> tuple[float, str]:
    """Compiles the encoders with CUDA graphs. Returns (seconds of an iteration, ""), or (0, what went wrong).

    Raises ValueError when the failure leaves the GPU unusable.
    """
    buffers = [(b, b.clone()) for encoder in (moco.encoder_q, moco.encoder_k) for b in encoder.buffers()]
    set_compiled(moco, "graphs")
    try:
        seconds, failure = time_graphs(config, moco, ranks), ""
    except Exception as error:  # the compiler and CUDA raise many kinds, and training works without graphs
        seconds, failure = 0.0, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        moco.encoder_q.zero_grad()
    if failure:
        check_device(ranks.device, failure)
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    return seconds, failure


def time_graphs(config: Config, moco: MoCo, ranks: Ranks) -> float:
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
        # The first step compiles and runs in that memory, the second records, the others replay.
        seconds = time_iterations({"graphs": step}, warm_up=4)["graphs"]
    if counters["inductor"]["cudagraph_skips"] > skipped:
        raise RuntimeError("torch did not capture all of them; its log says why")
    return seconds


def check_device(device: torch.device, failure: str) -> None:
    """Raises ValueError when a failure of CUDA graphs left the GPU, or torch's random numbers on it, unusable.

    Running out of memory does not. A CUDA error may: if it ends a capture, torch 2.11 believes that it is still
    capturing, and neither draws random numbers nor frees memory that another stream has used.
    """
    try:
        torch.rand(1, device=device).item()
    except RuntimeError as error:
        raise ValueError(f"CUDA graphs failed ({failure}) and left the GPU unusable: use --compile on") from error
