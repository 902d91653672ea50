"""`bench_throughput.py all`: the real loop with the real loader, beside its step, its loader and the classical loop.

The verdict says what the run is bound by. All loops run in this process, in turn, over the same images.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fastssl import distributed
from fastssl.bench.classical import classical_loop
from fastssl.bench.loops import loader_alone, our_loop, time_loops
from fastssl.bench.step import add_step_flags, as_line, make_config, print_timings, save
from fastssl.bench.timing import Timing
from fastssl.data_prep.work_pool import usable_cores
from fastssl.demo_images import write_demo_images

BOUND = 0.95  # of the step's rate: above it the loader does not matter


def verdict(timings: dict[str, Timing]) -> str:
    """One sentence: what to change first."""
    share = timings["step"].median / timings["all"].median
    spare = timings["step"].median / timings["loader alone"].median
    if share >= BOUND:
        return f"bound by the step: the loop runs at {share:.0%} of it, the loader alone could feed {spare:.1f} of them"
    if spare < 1:
        return (
            f"bound by the loader: alone it gives {spare:.0%} of what the step takes; convert the images "
            "(fastssl prep beton), use --loader resident, or more cores"
        )
    return (
        f"bound by the cores: the loop runs at {share:.0%} of the step though the loader alone could feed {spare:.1f}; "
        "both want the same cores"
    )


def main(argv: Sequence[str]) -> None:
    """Measures, prints and writes JSON."""
    parser = argparse.ArgumentParser(prog="bench_throughput.py all", description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="image folder with train/<class>/*; by default pictures drawn for the purpose")
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--loader", default="auto")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="of the classical loop")
    add_step_flags(parser)
    args = parser.parse_args(list(argv))
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or folder + "/images"
        if not args.data:
            write_demo_images(Path(data), seed=0, train=max(512, args.batch_size), val=10, size=256)
        compare(args, data)


def compare(args: argparse.Namespace, data: str) -> None:
    """All loops over the images of `data`."""
    ranks = distributed.start(args.device)
    config = make_config(args, args.arch, data=data, loader=args.loader)
    loops = {
        "step": our_loop(make_config(args, args.arch), ranks),
        "all": our_loop(config, ranks),
        "loader alone": loader_alone(config, ranks),
        "classical": classical_loop(data, config, ranks, args.workers, amp=False),
        "classical, AMP": classical_loop(data, config, ranks, args.workers, amp=True),
    }
    timings = time_loops(loops, args.steps, args.rounds)
    print(f"{args.arch}, {args.image_size} pixels, batch {args.batch_size}, queue {args.queue_size}, {ranks.device}:")
    print_timings(timings, args.batch_size, "classical")
    print(f"  {verdict(timings)}")
    save(args.output, [as_line(config, timings, args.steps) | {"verdict": verdict(timings)}])
