"""Training loops to time: ours over any loader, and the loader alone.

A `Loop` is a function that runs a given number of steps, after some warm-up, and returns the seconds they took.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import closing

import torch

from fastssl.batch import ImageBatch
from fastssl.bench.device import wait
from fastssl.bench.timing import read_in_turn
from fastssl.build import (
    Trainee,
    check_parts,
    compile_and_wrap,
    make_deterministic,
    make_trainee,
    open_loader,
    open_policy,
)
from fastssl.config import Config
from fastssl.distributed import Ranks
from fastssl.health import Health
from fastssl.input_stream import IN_TURN, InputStream
from fastssl.loaders.make import Loader
from fastssl.plan import make_plan
from fastssl.train import make_train_step

HOST = "host alone"  # the name of the loop that only measures how long the host launches kernels
WARM_UP = 3  # steps before the clock starts, in every turn, so that prefetch queues are as full as they stay
Loop = Callable[[int], float]
Step = Callable[[ImageBatch, int], torch.Tensor]


def our_loop(config: Config, ranks: Ranks, trainee: Trainee | None = None) -> Loop:
    """The product's loop, with its loader and training step; it waits for the device only at the end."""
    return our_loops(config, {"": open_loader(config, ranks)}, ranks, trainee or trainee_of(config, ranks))[""]


def trainee_of(config: Config, ranks: Ranks) -> Trainee:
    """What the configuration trains, with new weights and compiled encoders; also makes the device deterministic."""
    check_parts(config)
    make_deterministic(config.train.deterministic)
    return compile_and_wrap(config, make_trainee(config, ranks), ranks)


def our_loops(config: Config, loaders: dict[str, Loader], ranks: Ranks, trainee: Trainee) -> dict[str, Loop]:
    """Loops that differ only in their loaders, and share one training step, which is compiled once."""
    inputs = InputStream(ranks.device)
    step = our_step(config, ranks, trainee, next(iter(loaders.values())), inputs)

    def loop(loader: Loader) -> Loop:
        return lambda steps: time_steps(inputs.draw(loader.batches()), step, steps)

    return {name: loop(loader) for name, loader in loaders.items()}


def our_step(config: Config, ranks: Ranks, trainee: Trainee, loader: Loader, inputs: InputStream = IN_TURN) -> Step:
    """The product's training step for batches of `loader`: (batch, number of the step) -> its loss."""
    plan = make_plan(config, loader.batches_per_epoch)
    train_step = make_train_step(config, plan, trainee, open_policy(config), ranks, Health(ranks), inputs)
    return lambda batch, number: train_step(batch, number)["loss"]


def host_alone(config: Config, ranks: Ranks, trainee: Trainee) -> Loop:
    """The time in which the host launches a step's kernels, on a device that is idle."""
    loader = open_loader(config, ranks)
    step = our_step(config, ranks, trainee, loader)

    def loop(steps: int) -> float:
        seconds, batches = 0.0, loader.batches()
        for number in range(WARM_UP + steps):
            batch = next(batches)
            wait(ranks.device)
            start = time.perf_counter()
            step(batch, number)
            if number >= WARM_UP:
                seconds += time.perf_counter() - start
        return seconds

    return loop


def loader_alone(loader: Loader) -> Loop:
    """A loop that only moves batches to the device."""
    return lambda steps: time_steps(loader.batches(), lambda batch, number: batch.pixels[-1], steps)


def time_steps(batches: Iterable, step: Step, steps: int, warm_up: int | None = None) -> float:
    """Seconds of `steps` steps, after the warm-up and until the last result is there, from a new iterator."""
    warm_up = warm_up or WARM_UP
    with closing(iter(batches)) as iterator:
        for number in range(warm_up):
            result = step(next(iterator), number)
        result.item()
        start = time.perf_counter()
        for number in range(warm_up, warm_up + steps):
            result = step(next(iterator), number)
        result.item()  # waits for the device
        return time.perf_counter() - start


def time_loops(
    loops: dict[str, Loop], steps: int, rounds: int, keep: Callable[[dict[str, list[float]]], None]
) -> dict[str, list[float]]:
    """As `read_in_turn`, the seconds per step of loops."""
    return read_in_turn({name: lambda loop=loop: loop(steps) / steps for name, loop in loops.items()}, rounds, keep)
