"""The lines of the results of step, all and peers: one for each encoder, with the seconds of its loops."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from statistics import median

import torch

from fastssl.bench.compare import announce
from fastssl.bench.loops import HOST, Loop, time_loops
from fastssl.bench.results import loop_rows, show_row, write_result
from fastssl.bench.step_floor import step_floor
from fastssl.bench.step_parts import PART
from fastssl.bench.step_profile import print_profile, profile_step
from fastssl.bench.timing import while_time_lasts
from fastssl.build import Trainee, check_parts
from fastssl.config import Config, flat
from fastssl.distributed import Ranks
from fastssl.trials.compile_encoders import HOW_NAMES

Keep = Callable[[dict[str, object]], None]


def check_loops(configs: Sequence[Config], **about: object) -> None:
    """Before anything is made or measured: tells what is otherwise in the result to compare with.

    Raises ValueError for encoders that cannot be built.
    """
    for config in configs:
        check_parts(config)
    announce({"lines": [as_line(config, {}, 0, "") | about for config in configs]})


def measure_each(args: argparse.Namespace, ranks: Ranks, measure: Callable[[str, Keep], dict[str, object]]) -> None:
    """Measures the encoders of --arch in turn; prints and saves each line. One that fails does not stop the others.

    measure: is given an encoder, and a function that saves its line so far, which stands if it is cut short.

    Raises ValueError at the end for those that failed.
    """
    lines, failed = [], []
    for arch in while_time_lasts(args.arch):
        torch.compiler.reset()  # frees the CUDA graphs of the last one,
        gc.collect()  # and this its weights, which compiled code holds in cycles
        try:
            lines.append(measure(arch, lambda line: write_result(args.output, {"lines": [*lines, line]})))
        except RuntimeError as error:  # no memory, or whatever the compiler raises
            failed.append(f"{arch} ({type(error).__name__}: {' '.join(str(error).split())[:300]})")
            print(f"not measured: {failed[-1]}", flush=True)
            continue
        print_line(lines[-1], ranks.device)
        write_result(args.output, {"lines": lines})
    if failed:
        raise ValueError(f"not measured: {'; '.join(failed)}")


def time_line(
    args: argparse.Namespace, config: Config, trainee: Trainee, ranks: Ranks, loops: dict[str, Loop],
    beside: str, about: dict[str, object], keep: Keep,
) -> dict[str, object]:  # fmt: skip
    """Times the loops. Returns a line of the JSON with their seconds, `about`, and a look inside the step.

    That is its floor, how its encoders are compiled and, with --profile, its kernels.
    """
    about = about | {"floor": step_floor(config, ranks.device)}
    about |= {"compiled": trainee.compiled, "why_compiled": trainee.why_compiled}

    def line(seconds: dict[str, list[float]]) -> dict[str, object]:
        return as_line(config, seconds, args.steps, beside) | about

    seconds = time_loops(loops, args.steps, args.rounds, lambda seconds: keep(line(seconds)))
    profile = {"profile": profile_step(config, ranks, trainee)} if args.profile else {}
    return line(seconds) | profile


def as_line(config: Config, seconds: dict[str, list[float]], steps: int, beside: str) -> dict[str, object]:
    """A line of the JSON: the seconds of all loops, to be compared with the loop `beside`, and the step's parts."""
    defaults, named = flat(Config()), ("arch", "image_size", "batch_size", "queue_size", "compile", "device")
    settings = {name: value for name, value in flat(config).items() if value != defaults[name] or name in named}
    parts = {name.removeprefix(PART): median(s) for name, s in seconds.items() if name.startswith(PART)}
    loops = {name: s for name, s in seconds.items() if name != HOST and not name.startswith(PART)}
    line = {"settings": settings, "steps_a_turn": steps, "beside": beside, "seconds_of_rounds": loops}
    if parts:
        line["parts"] = parts
    if HOST in seconds:
        line["host_seconds"] = median(seconds[HOST])
    return line


def print_line(line: dict[str, object], device: torch.device) -> None:
    """Prints a line of the result: pairs/s of each loop, the parts of the step, and what was not measured."""
    s = line["settings"]
    print(f"{s['arch']}, {s['image_size']} pixels, batch {s['batch_size']}, queue {s['queue_size']}, {device}:")
    for row in loop_rows(line):
        print(f"  {show_row(row)}")
    if line.get("parts"):
        total = sum(line["parts"].values())
        shares = (f"{name} {seconds * 1e3:.3g} ms ({seconds / total:.0%})" for name, seconds in line["parts"].items())
        print(f"  parts of the step, each by itself: {', '.join(shares)}")
    if line.get("compiled"):
        print(f"  the encoders of the step are {HOW_NAMES[line['compiled']]} ({line['why_compiled']})")
    if line.get("host_seconds"):
        print(f"  the host launches a step's kernels in {line['host_seconds'] * 1e3:.3g} ms")
    if line.get("profile"):
        print_profile(line["profile"])
    for name, reason in line.get("not_measured", {}).items():
        print(f"  {name:28} not measured: {reason}")
    print(end="", flush=True)
