"""`bench_throughput.py all`: the real training loop, its step and its loader by themselves, and the classical loop.

All loops take turns in one process, over the same images; ours share one training step.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fastssl import distributed
from fastssl.arguments import positive
from fastssl.bench.classical import classical_loop
from fastssl.bench.loop_lines import Keep, check_loops, measure_each, time_line
from fastssl.bench.loops import loader_alone, our_loops, trainee_of
from fastssl.bench.photos import SOURCE, open_data
from fastssl.bench.step import step_loops
from fastssl.bench.step_flags import add_inner_flags, add_step_flags, make_config, parse_flags
from fastssl.build import open_loader
from fastssl.distributed import Ranks
from fastssl.loaders.choose import LOADERS
from fastssl.machine.limits import usable_cores


def main(argv: Sequence[str]) -> None:
    """Measures, prints, and writes JSON."""
    parser = argparse.ArgumentParser(prog="bench_throughput.py all", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", help=f"folder with images in <class>/ or train/<class>/ (default: {SOURCE})")
    add("--beton", help="the same images as a .beton (default: made from the folder)")
    add("--photos", type=positive, default=768, help="images to make without a folder (default 768)")
    add("--arch", nargs="+", default=["resnet18"], help="encoders (default resnet18)")
    add(
        "--loader",
        nargs="+",
        choices=("auto", *LOADERS),
        default=["auto"],
        help="loaders: auto and folder read the folder, others the .beton (default auto)",
    )
    add("--no-classical", action="store_true", help="leave out the classical loop")
    add("--workers", type=int, default=usable_cores(), help="processes of the classical loop (default all cores)")
    add_inner_flags(parser)
    add_step_flags(parser)
    args = parse_flags(parser, argv)
    ranks = distributed.start(args.device)
    args.device = ranks.device.type
    check_loops([make_config(args, arch) for arch in args.arch], images=args.data or args.beton or SOURCE)
    with tempfile.TemporaryDirectory() as scratch:
        data, beton = open_data(args.data, args.beton, Path(scratch), max(args.photos, args.batch_size))
        measure_each(args, ranks, lambda arch, keep: measure(args, arch, (data, beton), ranks, keep))


def measure(args: argparse.Namespace, arch: str, files: tuple[str, str], ranks: Ranks, keep: Keep) -> dict[str, object]:
    """Measures all loops of one architecture, and gives `keep` the line so far after each round.

    files: (folder, .beton). Returns a line of the JSON.
    """
    (data, beton), config = files, make_config(args, arch)
    loaders = {}
    for name in dict.fromkeys(args.loader):
        path = data if name in ("auto", "folder") else beton
        loader = open_loader(make_config(args, arch, data=path, loader=name), ranks)
        loaders[name if name == loader.name else f"{name} ({loader.name})"] = loader
    trainee = trainee_of(config, ranks)
    loops = step_loops(args, arch, trainee, ranks)
    loops |= our_loops(config, {f"all, {name}": loader for name, loader in loaders.items()}, ranks, trainee)
    loops |= {f"loader alone, {name}": loader_alone(loader) for name, loader in loaders.items()}
    missing = {}
    if not args.no_classical:
        for name, amp in (("classical", False), ("classical, AMP", True)):
            try:
                loops[name] = classical_loop(data, config, ranks, args.workers, amp)
            except ValueError as error:
                missing[name] = str(error)
    beside = next(name for name in ("classical", "eager step", "step") if name in loops)
    reasons = {name: loader.reason for name, loader in loaders.items()}
    about = {"not_measured": missing, "loaders": reasons, "images": args.data or args.beton or SOURCE}
    return time_line(args, config, trainee, ranks, loops, beside, about, keep)
