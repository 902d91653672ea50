"""`bench_throughput.py step --profile`: where the time of a step goes, kernel by kernel.

On a GPU: how long it was busy, how many kernels a step launches, and the kernels that took longest. On a CPU: torch's
operators by their own time; what runs outside of torch, as numba's loops for the views, is not among them.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable
from contextlib import closing

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fastssl.bench.device import silence_profiler
from fastssl.bench.loops import WARM_UP, our_step
from fastssl.build import Trainee, open_loader
from fastssl.config import Config
from fastssl.distributed import Ranks
from fastssl.input_stream import InputStream

STEPS = 4
LONGEST = 16  # number of kernels that are listed
NAME_WIDTH = 90
ANNOTATIONS = ("Torch-Compiled", "## ")  # ranges that torch.compile marks; their kernels are listed themselves


def profile_step(config: Config, ranks: Ranks, trainee: Trainee) -> dict[str, object]:
    """Averages over some steps: seconds, seconds in which the GPU was busy, launches, and the longest kernels."""
    cuda = ranks.device.type == "cuda"
    if not cuda:
        silence_profiler()
    loader, inputs = open_loader(config, ranks), InputStream(ranks.device)
    step = our_step(config, ranks, trainee, loader, inputs)
    with closing(inputs.draw(loader.batches())) as batches:
        for number in range(WARM_UP):
            step(next(batches), number).item()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*Profiler clears events at the end of each cycle")
            activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
            with profile(activities=activities) as profiler:
                start = time.perf_counter()
                for number in range(WARM_UP, WARM_UP + STEPS):
                    loss = step(next(batches), number)
                loss.item()  # waits for the device
                seconds = time.perf_counter() - start
    events = list(profiler.events())
    if not cuda:
        return {"seconds": seconds / STEPS, "kernels": longest((e.name, e.self_cpu_time_total) for e in events)}
    on_device = (e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation)
    kernels = [e for e in on_device if not e.name.startswith(ANNOTATIONS)]
    return {
        "seconds": seconds / STEPS,
        "busy_seconds": busy((e.time_range.start, e.time_range.end) for e in kernels) / 1e6 / STEPS,
        "launches": len(kernels) / STEPS,
        "kernels": longest((e.name, e.time_range.elapsed_us()) for e in kernels),
    }


def longest(timed: Iterable[tuple[str, float]]) -> list[dict[str, object]]:
    """From (name, microseconds) of every call: the names that took longest, with their calls and seconds per step."""
    total: dict[str, list[float]] = {}
    for name, microseconds in timed:
        total.setdefault(name, []).append(microseconds)
    found = sorted(total.items(), key=lambda item: -sum(item[1]))[:LONGEST]
    return [{"name": n, "count": len(us) / STEPS, "seconds": sum(us) / 1e6 / STEPS} for n, us in found]


def busy(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of the intervals, since kernels of two streams may overlap."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def print_profile(found: dict[str, object]) -> None:
    """Prints a table, longest first."""
    step, what = found["seconds"], "torch's operators by their own time"
    if "busy_seconds" in found:
        share = found["busy_seconds"] / step
        what = (
            f"with {found['launches']:.0f} kernels that keep the GPU busy {share:.0%} of the time, of which the longest"
        )
    print(f"  with the profiler a step takes {step * 1e3:.3g} ms, {what}:")
    for kernel in found["kernels"]:
        seconds, name = kernel["seconds"], kernel["name"][:NAME_WIDTH]
        print(f"    {seconds * 1e3:8.3f} ms {seconds / step:4.0%} {kernel['count']:6.1f} x  {name}")
