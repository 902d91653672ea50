"""`bench_throughput.py peers`: our real loop beside others', in this process, in turn, over the same files.

The others are the classical MoCo loop (torchvision and Pillow), DALI as solo-learn uses it and FFCV with a decoder for
each view, all in front of the same plain step. A contestant that cannot run here is named with its reason.
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
from fastssl.bench.classical import classical_loop
from fastssl.bench.loops import Loop, our_loop, time_loops, trainee_of
from fastssl.bench.peer_loops import dali_loop, ffcv_loop
from fastssl.bench.photos import SOURCE, open_data
from fastssl.bench.step import add_step_flags, as_line, make_config, print_line, save
from fastssl.data_prep.work_pool import usable_cores
from fastssl.distributed import Ranks

CLASSICAL = "classical"
OURS = ("resident", "beton", "dali", "folder")


def make_loops(args: argparse.Namespace, data: str, beton: str, ranks: Ranks) -> tuple[dict[str, Loop], dict[str, str]]:
    """(name -> loop, each tried for one step; name -> why it cannot run)."""
    plain = make_config(args, args.arch)
    files = {"resident": beton, "beton": beton, "dali": data, "folder": data}
    trainee = trainee_of(plain, ranks)  # compiled once, for all of ours

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
        except Exception as error:  # another library's: it may raise anything, and the others shall still be measured
            missing[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return loops, missing


def main(argv: Sequence[str]) -> None:
    """Measures, prints and writes JSON."""
    parser = ListParser(prog="bench_throughput.py peers", description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", help=f"folder of JPEGs in class folders; by default {SOURCE}")
    parser.add_argument("--beton", help="the same files as a .beton (fastssl prep beton DATA FILE --originals)")
    parser.add_argument("--photos", type=positive, default=768, help="of them, where no folder is given")
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--loader", nargs="+", choices=OURS, default=OURS, help="of our loop")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="threads or processes of the others")
    add_step_flags(parser)
    args = parser.parse_args(list(argv))
    ranks = distributed.start(args.device)
    args.device = ranks.device.type
    with tempfile.TemporaryDirectory() as scratch:
        data, beton = open_data(args.data, args.beton, Path(scratch), max(args.photos, args.batch_size))
        loops, missing = make_loops(args, data, beton, ranks)
        if CLASSICAL not in loops:
            raise SystemExit(f"the classical loop is what all others are compared with: {missing[CLASSICAL]}")
        seconds = time_loops(loops, args.steps, args.rounds)
    line = as_line(make_config(args, args.arch, loader="auto"), seconds, args.steps, CLASSICAL)
    line |= {"not_measured": missing, "images": args.data or SOURCE}
    print_line(line, ranks.device)
    save(args.output, [line])
