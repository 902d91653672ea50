"""`bench_throughput.py peers`: our training loop and those of others, in turn in one process, over the same files.

The others are the classical MoCo loop (torchvision and Pillow), DALI as solo-learn uses it, and FFCV with a decoder for
each view, all with the same plain training step. A loop that cannot run here is listed with the reason.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from fastssl import distributed
from fastssl.arguments import ListParser, positive
from fastssl.bench.classical import check_fill, classical_loop
from fastssl.bench.loop_lines import as_line, check_loops, print_line
from fastssl.bench.loops import Loop, our_loop, time_loops, trainee_of
from fastssl.bench.peer_loops import dali_loop, ffcv_loop
from fastssl.bench.photos import SOURCE, open_data
from fastssl.bench.results import write_result
from fastssl.bench.step_flags import add_step_flags, make_config, parse_flags
from fastssl.distributed import Ranks
from fastssl.loaders.beton_file import open_beton
from fastssl.machine.limits import usable_cores

CLASSICAL = "classical"
OURS = ("resident", "beton", "dali", "folder")


def make_loops(args: argparse.Namespace, data: str, beton: str, ranks: Ranks) -> tuple[dict[str, Loop], dict[str, str]]:
    """({name: loop}, each tried for one step; {name: why it cannot run})."""
    plain = make_config(args, args.arch)
    files = {"resident": beton, "beton": beton, "dali": data, "folder": data}
    trainee = trainee_of(plain, ranks)  # compiled once, for all our loops

    def ours(name: str) -> Loop:
        return our_loop(make_config(args, args.arch, data=files[name], loader=name), ranks, trainee)

    makers: dict[str, Callable[[], Loop]] = {f"ours, {name}": partial(ours, name) for name in args.loader}
    makers |= {
        "DALI, as solo-learn": partial(dali_loop, data, plain, ranks, args.workers),
        "FFCV, a decoder per view": partial(ffcv_loop, beton, plain, ranks, args.workers),
        f"{CLASSICAL}, AMP": partial(classical_loop, data, plain, ranks, args.workers, amp=True),
        CLASSICAL: partial(classical_loop, data, plain, ranks, args.workers, amp=False),
    }
    loops, missing = {}, {}
    for name, make in makers.items():
        start = time.perf_counter()
        try:
            loop = make()
            loop(1)
            loops[name] = loop
            print(f"{name} is ready after {time.perf_counter() - start:.1f} s", flush=True)
        except Exception as error:  # other libraries may raise anything, and the rest is still to be measured
            missing[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            print(f"{name} cannot run: {missing[name]}", flush=True)
    return loops, missing


def main(argv: Sequence[str]) -> None:
    """Measures, prints, and writes JSON."""
    parser = ListParser(prog="bench_throughput.py peers", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("data", nargs="?", help=f"folder with JPEGs in class folders (default: {SOURCE})")
    add("--beton", help="the same files as a .beton (fastssl prep beton DATA FILE --originals)")
    add("--photos", type=positive, default=768, help="images to make without a folder (default 768)")
    add("--arch", default="resnet18", help="encoder (default resnet18)")
    add("--loader", nargs="+", choices=OURS, default=OURS, help="loaders of our loop (default all)")
    add("--workers", type=int, default=usable_cores(), help="threads or processes of the others (default all cores)")
    add_step_flags(parser)
    args = parse_flags(parser, argv)
    ranks = distributed.start(args.device)
    args.device = ranks.device.type
    images, config = args.data or args.beton or SOURCE, make_config(args, args.arch, loader="auto")
    check_loops([config], images=images)
    with tempfile.TemporaryDirectory() as scratch:
        data, beton = open_data(args.data, args.beton, Path(scratch), max(args.photos, args.batch_size))
        check_fill(len(open_beton(beton)), config)
        loops, missing = make_loops(args, data, beton, ranks)
        if not loops:
            raise ValueError(
                "no loop can run here, for the reasons above: `fastssl doctor` says how to mend what is missing"
            )
        beside = CLASSICAL if CLASSICAL in loops else list(loops)[-1]

        def line(seconds: dict[str, list[float]]) -> dict[str, object]:
            found = as_line(config, seconds, args.steps, beside)
            return found | {"not_measured": missing, "images": images}

        def keep(seconds: dict[str, list[float]]) -> None:
            write_result(args.output, {"lines": [line(seconds)]})

        seconds = time_loops(loops, args.steps, args.rounds, keep)
    print_line(line(seconds), ranks.device)
