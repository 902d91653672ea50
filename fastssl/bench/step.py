"""`bench_throughput.py step`: the real training step, over images already on the device, for each architecture.

It is compared with the same step in plain PyTorch (eager encoders, the N x K matrix in the loss, on a CPU the library's
own convolutions). Also measured: the parts of the step, each run by itself, and the floor that arithmetic and memory
traffic set.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fastssl import distributed
from fastssl.bench.loop_lines import Keep, check_loops, measure_each, time_line
from fastssl.bench.loops import HOST, Loop, host_alone, our_loop, trainee_of
from fastssl.bench.step_flags import COMPILE, add_inner_flags, add_step_flags, make_config, parse_flags
from fastssl.bench.step_parts import step_parts
from fastssl.build import Trainee
from fastssl.models.cpu_conv import use_plain_convolutions

ARCHS = ("resnet18", "mobilenetv3_small", "mobilenetv3_large", "efficientnet_b0", "deit_tiny", "resnet50")


def step_loops(args: argparse.Namespace, arch: str, trainee: Trainee, ranks: distributed.Ranks) -> dict[str, Loop]:
    """The step, the eager step (unless --no-eager), on a GPU the host alone, and the parts of the step."""
    config = make_config(args, arch)
    loops: dict[str, Loop] = {"step": our_loop(config, ranks, trainee)}
    if not args.no_eager:
        eager = make_config(args, arch, compile="off", loss_kernel="reference")
        plain = trainee_of(eager, ranks)
        use_plain_convolutions(plain.moco)
        loops["eager step"] = our_loop(eager, ranks, plain)
    if ranks.device.type == "cuda":
        loops[HOST] = host_alone(config, ranks, trainee)
    return loops | step_parts(config, trainee, ranks)


def measure(args: argparse.Namespace, arch: str, ranks: distributed.Ranks, keep: Keep) -> dict[str, object]:
    """Measures one architecture, and gives `keep` the line so far after each round. Returns a line of the JSON."""
    config = make_config(args, arch)
    trainee = trainee_of(config, ranks)
    loops = step_loops(args, arch, trainee, ranks)
    for how in args.also_compile:
        loops[f"step, --compile {how}"] = our_loop(make_config(args, arch, compile=how), ranks)
    return time_line(args, config, trainee, ranks, loops, "step" if args.no_eager else "eager step", {}, keep)


def main(argv: Sequence[str]) -> None:
    """Measures, prints, and writes JSON."""
    parser = argparse.ArgumentParser(prog="bench_throughput.py step", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=ARCHS, help=f"encoders ({' '.join(ARCHS)})")
    parser.add_argument(
        "--also-compile",
        nargs="+",
        default=[],
        choices=COMPILE,
        help="also time the step with these, in the same rounds",
    )
    add_inner_flags(parser)
    add_step_flags(parser)
    args = parse_flags(parser, argv)
    ranks = distributed.start(args.device)
    args.device = ranks.device.type
    check_loops([make_config(args, arch) for arch in args.arch])
    measure_each(args, ranks, lambda arch, keep: measure(args, arch, ranks, keep))
