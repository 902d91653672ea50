"""`bench_throughput.py step`: the real training step, on bytes that lie on the device, for each architecture.

Beside it the same step without what we add to plain PyTorch: eager encoders, the loss with its N x K matrix.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from fastssl import distributed
from fastssl.bench.loops import Loop, our_loop, time_loops
from fastssl.bench.timing import Timing
from fastssl.config import Config, flat, replace
from fastssl.environment import environment

ARCHS = ("resnet18", "mobilenetv3_small", "mobilenetv3_large", "efficientnet_b0", "deit_tiny", "resnet50")


def add_step_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that step and all share."""
    cuda = torch.cuda.is_available()
    parser.add_argument("--image-size", type=int, default=224 if cuda else 64)
    parser.add_argument("--batch-size", type=int, default=256 if cuda else 64)
    parser.add_argument("--queue-size", type=int, default=65536)
    parser.add_argument("--head", default="simple")
    parser.add_argument("--policy", default="v2")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--compile", default="auto", choices=("auto", "on", "off"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--steps", type=int, default=50 if cuda else 6, help="steps of one turn")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contestant")
    parser.add_argument("--output", type=Path, help="where to write the JSON")


def make_config(args: argparse.Namespace, arch: str, **options: object) -> Config:
    """MoCo v2's loss and schedule with the sizes of the command line, over synthetic bytes unless told otherwise."""
    shared = ("image_size", "batch_size", "queue_size", "head", "policy", "precision", "compile", "device")
    settings = {name: getattr(args, name) for name in shared} | {
        "arch": arch,
        "loader": "synthetic",
        "synthetic_images": max(512, args.batch_size),
        "contrast_weight": 1.0,
        "temperature": 0.2,
        "align_weight": 0.0,
        "uniform_weight": 0.0,
        "lr_schedule": "cosine",
    }
    return replace(Config(), **(settings | options))


def print_timings(timings: dict[str, Timing], batch_size: int, beside: str) -> None:
    """One line each: pairs/s with the spread, and the ratio to `beside`."""
    for name, timing in timings.items():
        low, high = batch_size / timing.high, batch_size / timing.low
        ratio = timings[beside].median / timing.median
        rate = batch_size / timing.median
        print(f"  {name:34} {rate:9.1f} pairs/s ({low:.1f} to {high:.1f}), {ratio:5.2f} x {beside}", flush=True)


def save(path: Path | None, lines: Sequence[dict[str, object]]) -> None:
    """The JSON, with where and how it was measured."""
    if path:
        path.write_text(json.dumps({"environment": environment(), "lines": list(lines)}, indent=1) + "\n")


def as_line(config: Config, timings: dict[str, Timing], steps: int) -> dict[str, object]:
    """What the JSON keeps of one comparison."""
    changed = {name: value for name, value in flat(config).items() if value != flat(Config())[name]}
    seconds = {name: timing._asdict() for name, timing in timings.items()}
    return {"settings": changed, "steps_a_turn": steps, "seconds_per_step": seconds}


def main(argv: Sequence[str]) -> None:
    """Measures, prints and writes JSON."""
    parser = argparse.ArgumentParser(prog="bench_throughput.py step", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=ARCHS)
    add_step_flags(parser)
    args = parser.parse_args(list(argv))
    ranks, lines = distributed.start(args.device), []
    for arch in args.arch:
        torch.compiler.reset()
        config = make_config(args, arch)
        plain = make_config(args, arch, compile="off", loss_kernel="reference")
        loops: dict[str, Loop] = {"step": our_loop(config, ranks), "eager step": our_loop(plain, ranks)}
        timings = time_loops(loops, args.steps, args.rounds)
        print(f"{arch}, {args.image_size} pixels, batch {args.batch_size}, queue {args.queue_size}, {ranks.device}:")
        print_timings(timings, args.batch_size, "eager step")
        lines.append(as_line(config, timings, args.steps))
    save(args.output, lines)
