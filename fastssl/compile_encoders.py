"""torch.compile of the encoders: on a GPU, and as CUDA graphs where the host takes long to launch their kernels.

A small encoder launches a thousand short kernels a step. The GPU then waits for the host, which waits for whatever else
runs on its cores, as threads that read images. A CUDA graph is one launch, but wants memory of its own.
"""

from __future__ import annotations

import gc
import sys
import warnings

import torch

from fastssl.config import Config
from fastssl.distributed import Ranks, broadcast_object, gather_objects
from fastssl.encoder_timing import images_to_time, make_eager_iteration, make_iteration, time_in_turn
from fastssl.moco import MoCo
from fastssl.plan import encoder_batch_size

MODES = {"on": "default", "graphs": "reduce-overhead"}  # as torch.compile calls them
HOW_NAMES = {"off": "not compiled", "on": "compiled", "graphs": "compiled, as CUDA graphs"}
FEW = 8  # images, with which the GPU is done before the host has launched the next kernel
HOST_BOUND = 0.5  # of an eager iteration's time: compiled ones are shorter, and cost the host no less a kernel


def compile_encoders(config: Config, moco: MoCo, ranks: Ranks) -> tuple[str, str]:
    """Compiles both encoders in place, so that weights keep their names. Returns how (of HOW_NAMES), and why.

    The same on every rank; call on all of them, before DDP wraps encoder_q. What is measured leaves weights, buffers
    and random state as they were. Raises ValueError for graphs on a CPU.
    """
    asked, cuda = config.train.compile, ranks.device.type == "cuda"
    if asked == "graphs" and not cuda:
        raise ValueError("--compile graphs replays CUDA graphs, and this run is on a CPU: take --compile on")
    if asked != "auto":
        how, why = asked, "asked for"
    elif not cuda:
        how, why = "off", "no CUDA device"
    elif reason := why_no_graphs(config):
        how, why = "on", reason
    else:
        return choose_by_clock(config, moco, ranks)
    set_compiled(moco, how)
    return how, why


def why_no_graphs(config: Config) -> str:
    """What speaks against trying CUDA graphs, or ""."""
    if config.train.deterministic:
        return "no clock chooses CUDA graphs in a deterministic run"
    if config.optim.accumulate > 1:  # a replay overwrites the gradients of the one before
        return "CUDA graphs do not go with --accumulate"
    if config.model.sync_bn:
        return "CUDA graphs are not tried with --sync-bn, whose ranks talk within the encoders"
    return ""


def choose_by_clock(config: Config, moco: MoCo, ranks: Ranks) -> tuple[str, str]:
    """Graphs, if the host takes long to launch an eager iteration, and if they work and are faster than that one."""
    with torch.random.fork_rng([ranks.device]):
        launching, eager = broadcast_object(time_eager(config, moco, ranks), ranks)
        told = f"measured at the start: eager {1e3 * eager:.3g} ms, its launches {1e3 * launching:.3g} ms"
        if launching < HOST_BOUND * eager:
            set_compiled(moco, "on")
            return "on", told
        if ranks.rank == 0:
            print("compiling the encoders to try CUDA graphs: minutes the first time", file=sys.stderr, flush=True)
        torch.cuda.empty_cache()  # graphs have memory of their own
        tried = gather_objects(try_graphs(config, moco, ranks), ranks)
    failure = next((failure for _, failure in tried if failure), "")
    seconds = tried[0][0]
    if not failure and seconds < eager:  # no margin: what is compiled without graphs is no faster than with them
        return "graphs", f"{told}, as CUDA graphs {1e3 * seconds:.3g} ms"
    torch.compiler.reset()  # gives the graphs' memory back
    gc.collect()  # but for what a failure's frames hold, in cycles
    set_compiled(moco, "on")
    return "on", f"{told}, as CUDA graphs " + (f"they failed: {failure}" if failure else f"{1e3 * seconds:.3g} ms")


def set_compiled(moco: MoCo, how: str) -> None:
    """How the encoders are compiled when they are next called."""
    for encoder in (moco.encoder_q, moco.encoder_k):
        if how != "off":
            encoder.compile(mode=MODES[how])


def time_eager(config: Config, moco: MoCo, ranks: Ranks) -> tuple[float, float]:
    """(seconds the host takes to launch an eager iteration, seconds it takes with all of a rank's images)."""
    batch, most = encoder_batch_size(config, ranks), images_to_time(config, ranks)
    few = min(FEW, most)
    sizes, encoder = {few, most}, moco.encoder_q
    seconds = time_in_turn({n: make_eager_iteration(config, encoder, n, moco.memory_format) for n in sizes})
    return seconds[few], seconds[most] * batch / most


def try_graphs(config: Config, moco: MoCo, ranks: Ranks) -> tuple[float, str]:
    """Compiles the encoders as CUDA graphs: (seconds of an iteration, ""), or (0, what went wrong).

    Raises ValueError where the run cannot go on without them either.
    """
    buffers = [(b, b.clone()) for encoder in (moco.encoder_q, moco.encoder_k) for b in encoder.buffers()]
    set_compiled(moco, "graphs")
    try:
        seconds, failure = time_graphs(config, moco, ranks), ""
    except Exception as error:  # of the compiler or of CUDA: many kinds, and most runs can do without graphs
        seconds, failure = 0.0, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        moco.encoder_q.zero_grad()
    if failure:
        check_device(ranks.device, failure)
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    return seconds, failure


def time_graphs(config: Config, moco: MoCo, ranks: Ranks) -> float:
    """Seconds of an iteration. Raises RuntimeError where torch makes no graph of some part, besides what it raises."""
    from torch._dynamo.utils import counters  # seconds to import, and only here

    device, skipped = ranks.device, counters["inductor"]["cudagraph_skips"]
    images = encoder_batch_size(config, ranks)
    iteration = make_iteration(config, moco.encoder_q, moco.encoder_k, images, moco.memory_format)

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()  # what earlier replays returned is not needed any more
        iteration()

    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    with warnings.catch_warnings(), torch.cuda.stream(stream):  # a capture that fails may leave its own as the current
        warnings.filterwarnings("ignore", message="The CUDA Graph is empty")  # one torch makes to have its memory
        # the first step compiles and runs in that memory, the second records, the others replay
        seconds = time_in_turn({"graphs": step}, warm_up=4)["graphs"]
    if counters["inductor"]["cudagraph_skips"] > skipped:
        raise RuntimeError("torch left some out, its log says why")
    return seconds


def check_device(device: torch.device, failure: str) -> None:
    """Raises ValueError where a failure of CUDA graphs left the GPU, or torch's random numbers on it, unusable.

    Out of memory is survived. A CUDA error may not be: where it ends a capture, torch 2.11 takes itself to be still
    capturing, and would neither draw numbers nor free what another stream has used.
    """
    try:
        torch.rand(1, device=device).item()
    except RuntimeError as error:
        raise ValueError(f"CUDA graphs failed ({failure}) and left the GPU unusable: take --compile on") from error
