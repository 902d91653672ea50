"""`bench_throughput.py step`: the real training step, on bytes that lie on the device, for each architecture.

Beside it the same step without what we add to plain PyTorch (eager encoders, on a CPU with its library's convolutions
only, the loss with its N x K matrix), the parts of the step, each run by itself, and the floor of its arithmetic and
memory traffic.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from fastssl import distributed
from fastssl.arguments import positive
from fastssl.bench.loops import Loop, host_alone, our_loop, time_loops, trainee_of
from fastssl.bench.results import loop_rows, show_row
from fastssl.bench.step_floor import step_floor
from fastssl.bench.step_parts import PART, step_parts
from fastssl.bench.step_profile import print_profile, profile_step
from fastssl.bench.timing import while_time_lasts
from fastssl.build import Trainee
from fastssl.compile_encoders import HOW_NAMES
from fastssl.config import Config, flat, replace
from fastssl.environment import environment
from fastssl.models.cpu_conv import use_plain_convolutions

ARCHS = ("resnet18", "mobilenetv3_small", "mobilenetv3_large", "efficientnet_b0", "deit_tiny", "resnet50")
COMPILE = ("auto", "on", "graphs", "off")
HOST = "host alone"  # the loop whose seconds are kept apart


def add_step_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that step, all and peers share."""
    cuda = torch.cuda.is_available()
    parser.add_argument("--image-size", type=positive, default=224 if cuda else 64)
    parser.add_argument("--batch-size", type=positive, default=256 if cuda else 64)
    parser.add_argument("--queue-size", type=positive, default=65536)
    parser.add_argument("--head", default="simple")
    parser.add_argument("--policy", default="v2")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--compile", default="auto", choices=COMPILE)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--steps", type=positive, default=50 if cuda else 6, help="steps of one turn")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contestant")
    parser.add_argument("--profile", action="store_true", help="of step and all: the kernels that take most of a step")
    parser.add_argument("--no-eager", action="store_true", help="of step and all: leave the eager step out")
    parser.add_argument("--output", type=Path, help="where to write the JSON")


def make_config(args: argparse.Namespace, arch: str, **options: object) -> Config:
    """MoCo v2's loss and schedule with the sizes of the command line, over synthetic bytes unless told otherwise."""
    shared = ("image_size", "batch_size", "queue_size", "head", "policy", "precision", "compile", "device")
    settings = {name: getattr(args, name) for name in shared} | {
        "arch": arch,
        "loader": "synthetic",
        "synthetic_images": max(args.batch_size, min(512, 16 * args.batch_size)),
        "contrast_weight": 1.0,
        "temperature": 0.2,
        "align_weight": 0.0,
        "uniform_weight": 0.0,
        "lr_schedule": "cosine",
    }
    return replace(Config(), **(settings | options))


def print_line(line: dict[str, object], device: torch.device) -> None:
    """Pairs/s of each loop with the spread and the ratio to the peer, the parts of the step, who is missing."""
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


def save(path: Path | None, lines: Sequence[dict[str, object]]) -> None:
    """The JSON, with where and how it was measured."""
    if path:
        path.write_text(json.dumps({"environment": environment(), "lines": list(lines)}, indent=1) + "\n")


def as_line(config: Config, seconds: dict[str, list[float]], steps: int, beside: str) -> dict[str, object]:
    """What the JSON keeps of one comparison with the loop `beside`; parts of the step by their medians."""
    changed = {name: value for name, value in flat(config).items() if value != flat(Config())[name]}
    sizes = {
        name: flat(config)[name] for name in ("arch", "image_size", "batch_size", "queue_size", "compile", "device")
    }
    parts = {name.removeprefix(PART): sorted(s)[len(s) // 2] for name, s in seconds.items() if name.startswith(PART)}
    loops = {name: s for name, s in seconds.items() if name != HOST and not name.startswith(PART)}
    host = {"host_seconds": median(seconds[HOST])} if HOST in seconds else {}
    line = {"settings": changed | sizes, "steps_a_turn": steps, "beside": beside, "seconds_of_rounds": loops}
    return line | ({"parts": parts} if parts else {}) | host


def step_loops(args: argparse.Namespace, arch: str, trainee: Trainee, ranks: distributed.Ranks) -> dict[str, Loop]:
    """The step beside the eager one (unless --no-eager), and its parts."""
    config = make_config(args, arch)
    loops: dict[str, Loop] = {"step": our_loop(config, ranks, trainee)}
    if not args.no_eager:
        eager = make_config(args, arch, compile="off", loss_kernel="reference")
        plain = trainee_of(eager, ranks)
        use_plain_convolutions(plain.moco)
        loops["eager step"] = our_loop(eager, ranks, plain)
    if ranks.device.type == "cuda":  # elsewhere the host is the device
        loops[HOST] = host_alone(config, ranks, trainee)
    return loops | step_parts(config, trainee, ranks)


def measure(args: argparse.Namespace, arch: str, ranks: distributed.Ranks) -> dict[str, object]:
    """One architecture, as a line of the JSON."""
    torch.compiler.reset()
    config = make_config(args, arch)
    trainee = trainee_of(config, ranks)
    loops = step_loops(args, arch, trainee, ranks)
    for how in args.also_compile:
        loops[f"step, --compile {how}"] = our_loop(make_config(args, arch, compile=how), ranks)
    seconds = time_loops(loops, args.steps, args.rounds)
    line = as_line(config, seconds, args.steps, "step" if args.no_eager else "eager step")
    return line | look_inside(args, config, ranks, trainee)


def look_inside(args: argparse.Namespace, config: Config, ranks: distributed.Ranks, trainee: Trainee) -> dict:
    """What the line keeps beside the times: the step's floor, how its encoders run, with --profile its kernels."""
    profile = {"profile": profile_step(config, ranks, trainee)} if args.profile else {}
    compiled = {"compiled": trainee.compiled, "why_compiled": trainee.why_compiled}
    return {"floor": step_floor(config, ranks.device)} | compiled | profile


def main(argv: Sequence[str]) -> None:
    """Measures, prints and writes JSON."""
    parser = argparse.ArgumentParser(prog="bench_throughput.py step", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=ARCHS)
    parser.add_argument(
        "--also-compile",
        nargs="+",
        default=[],
        choices=COMPILE,
        help="time the step under these too, in the same rounds",
    )
    add_step_flags(parser)
    args = parser.parse_args(list(argv))
    ranks, lines = distributed.start(args.device), []
    args.device = ranks.device.type
    for arch in while_time_lasts(args.arch):
        lines.append(measure(args, arch, ranks))
        print_line(lines[-1], ranks.device)
        save(args.output, lines)
