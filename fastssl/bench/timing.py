"""Clocks for comparisons: functions are timed in turn in one process, so that disturbances affect all of them.

On a GPU each function is captured as a CUDA graph and its replays are timed with events, so that nobody's launch costs
in Python are counted. On a CPU the wall clock is read around each call.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from tqdm import tqdm

from fastssl.bench.device import CPU, wait

Function = Callable[[], object]
FEWEST_ROUNDS = 3  # for a median and a spread
_deadline = float("inf")


class Timing(NamedTuple):
    """Seconds of one call: the median over `rounds` rounds, and the tenth and ninetieth percentiles."""

    median: float
    low: float
    high: float
    rounds: int


def in_words(times_faster: Timing) -> str:
    """ "faster", "slower" or "within the noise" of a ratio with its spread, which needs FEWEST_ROUNDS rounds."""
    if times_faster.rounds < FEWEST_ROUNDS:
        return f"too few rounds to judge: {times_faster.rounds}"
    if times_faster.low > 1:
        return "faster"
    return "slower" if times_faster.high < 1 else "within the noise"


def stop_after(seconds: float) -> None:
    """After so many seconds, no measurement in this process begins another round; each makes at least three."""
    global _deadline
    _deadline = time.monotonic() + seconds


def while_time_lasts(names: Sequence[str]) -> Iterator[str]:
    """The names in turn, at least the first, until the time of `stop_after` is over; then prints the others.

    Each has its share of the time, so that the rounds of the first do not take that of the last.
    """
    global _deadline
    start, end = time.monotonic(), _deadline
    for i, name in enumerate(names):
        if i and time.monotonic() > end:
            print(f"not measured, since the time of --seconds is over: {', '.join(names[i:])}", flush=True)
            return
        _deadline = start + (end - start) * (i + 1) / len(names)
        yield name


def turns(rounds: int) -> Iterator[int]:
    """0, 1, ... rounds - 1, or fewer if the time of `stop_after` is over."""
    for turn in range(rounds):
        if turn >= FEWEST_ROUNDS and time.monotonic() > _deadline:
            return
        yield turn


def in_turn(names: Iterable[str], rounds: int) -> Iterator[str]:
    """All names once per round; each round starts with another one. On a terminal a bar says whose turn it is."""
    order = deque(names)
    with tqdm(total=rounds * len(order), unit="turn", dynamic_ncols=True, disable=None, leave=False) as bar:
        for _ in turns(rounds):
            for name in order:
                bar.set_description(name)
                yield name
                bar.update()
            order.rotate(-1)


def time_in_turn(functions: dict[str, Function], device: torch.device, rounds: int) -> dict[str, Timing]:
    """Times every function once per round; each round starts with another one."""
    if device.type != "cuda":
        return time_calls(functions, device, rounds)
    return summarise_all(read_in_turn({name: _gpu_clock(f) for name, f in functions.items()}, rounds))


def read_in_turn(
    clocks: dict[str, Callable[[], float]], rounds: int, keep: Callable[[dict[str, list[float]]], None] = lambda _: None
) -> dict[str, list[float]]:
    """Reads every clock once per round; each round starts with another one. Returns the seconds of all rounds.

    keep: called after each round with the seconds so far.
    """
    seconds = {name: [] for name in clocks}
    for name in in_turn(clocks, rounds):
        seconds[name].append(clocks[name]())
        if len({len(measured) for measured in seconds.values()}) == 1:
            keep(seconds)
    return seconds


def time_calls(functions: dict[str, Function], device: torch.device, rounds: int) -> dict[str, Timing]:
    """As `time_in_turn`, for what cannot be captured in a graph: the wall clock until the device is done."""
    return summarise_all(read_in_turn({name: wall_clock(f, device) for name, f in functions.items()}, rounds))


def summarise(seconds: list[float]) -> Timing:
    """The median and the tenth and ninetieth percentiles."""
    low, median, high = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.1, 0.5, 0.9]).double())
    return Timing(median.item(), low.item(), high.item(), len(seconds))


def summarise_all(seconds: dict[str, list[float]]) -> dict[str, Timing]:
    """Of the seconds of all rounds of each contestant."""
    return {name: summarise(measured) for name, measured in seconds.items()}


def times_faster(seconds: dict[str, list[float]], name: str, beside: str) -> Timing:
    """How many times faster `name` is than `beside`, by the ratio within each round: disturbances affect both."""
    return summarise([theirs / ours for theirs, ours in zip(seconds[beside], seconds[name])])


def stopwatch(function: Function, device: torch.device = CPU) -> Callable[[], float]:
    """A clock: the seconds of a call of the function, until the device is done."""

    def read() -> float:
        start = time.perf_counter()
        function()
        wait(device)
        return time.perf_counter() - start

    return read


def wall_clock(function: Function, device: torch.device = CPU) -> Callable[[], float]:
    """The same after a first call, which allocates memory and compiles."""
    function()
    wait(device)
    return stopwatch(function, device)


def _gpu_clock(function: Function) -> Callable[[], float]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads, such as DALI's, may allocate
        function()

    def read(replays: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / replays

    read(3)
    replays = max(1, int(2e-3 / read(1)))  # at least two milliseconds between the events
    return lambda: read(replays)
