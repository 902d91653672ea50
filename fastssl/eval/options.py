"""What every evaluation command understands: the reference scripts' flags, and a few of our own."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import torch

from fastssl.arguments import ListParser, numbers, positive, positive_float, rate
from fastssl.data_prep.work_pool import usable_cores
from fastssl.launch import launch_if_asked


def make_parser(command: str, description: str, *, batch_size: int, data: str) -> argparse.ArgumentParser:
    """A parser with the shared flags. batch_size: the reference script's default; data: what DIR is, for --help."""
    p = ListParser(
        prog=f"fastssl eval {command}",
        description=description,
        allow_abbrev=False,
        epilog="Several GPUs: torchrun --nproc_per_node N -m fastssl.eval.NAME ..., or --multiprocessing-distributed "
        "with --world-size, --rank and --dist-url; one GPU of several: --gpu I.",
    )
    p.add_argument("data", metavar="DIR", help=data)
    p.add_argument("-a", "--arch", help="backbone by name (default: what the checkpoint names, else resnet50)")
    p.add_argument("--pretrained", default="", metavar="PATH", help="checkpoint or run folder; random weights without")
    p.add_argument("-b", "--batch-size", type=positive, default=batch_size, metavar="N", help=f"(default {batch_size})")
    p.add_argument("-j", "--workers", "--num-workers", type=positive, metavar="N", help="decoding threads (all cores)")
    p.add_argument("--image-size", type=positive, default=224, help="pixels of the centre crop (default 224)")
    p.add_argument("--resize", type=positive, help="short side before the crop (default 256 for 224, in proportion)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU if there is one")
    p.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the encoder")
    p.add_argument("--max-mem-gb", type=positive_float, metavar="GB", help="most memory of a process, features on disk")
    p.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
    p.add_argument("--json", metavar="FILE", help="write the results there, too")
    return p


def add_training_flags(p: argparse.ArgumentParser, *, print_freq: int) -> None:
    """The flags that the reference's linear and transfer scripts share."""
    p.add_argument("--epochs", type=positive, default=100, metavar="N", help="(default 100)")
    p.add_argument("--start-epoch", type=int, default=0, metavar="N", help="first epoch of a run that resumes nothing")
    p.add_argument("--lr", "--learning-rate", type=rate, default=30.0, metavar="LR", help="(default 30)")
    p.add_argument("--schedule", type=int, nargs="*", default=[60, 80], help="epochs at which the rate drops (60 80)")
    p.add_argument("--momentum", type=rate, default=0.9, metavar="M", help="of SGD (default 0.9)")
    p.add_argument("--wd", "--weight-decay", dest="weight_decay", type=rate, default=0.0, metavar="W", help="(0)")
    p.add_argument("-p", "--print-freq", type=positive, default=print_freq, metavar="N", help=f"({print_freq})")
    p.add_argument("--resume", default="", metavar="PATH", help="go on from a checkpoint this command wrote")
    p.add_argument("-e", "--evaluate", action="store_true", help="only validate (the classifier of --resume)")
    p.add_argument("--output", metavar="DIR", help="folder of the checkpoints")
    p.add_argument(
        "--protocol",
        choices=("reference", "cached"),
        default="reference",
        help="reference: augmented images every epoch; cached: features of centre crops once, all settings together",
    )
    p.add_argument("--lrs", type=numbers, metavar="A,B,..", help="cached: sweep these learning rates instead of --lr")
    p.add_argument("--wds", type=numbers, metavar="A,B,..", help="cached: sweep these weight decays instead of --wd")


def check_training_flags(options: argparse.Namespace) -> None:
    """Raises ValueError for flags that contradict each other."""
    swept = [flag for flag, value in (("--lrs", options.lrs), ("--wds", options.wds)) if value]
    if options.protocol == "reference" and swept:
        raise ValueError(f"{swept[0]} sweeps settings, which is --protocol cached: add it, or give one --lr and --wd")
    if options.protocol == "cached" and (options.resume or options.evaluate or options.output):
        raise ValueError("--protocol cached keeps no checkpoints: leave out --resume, --evaluate and --output")
    if options.evaluate and not options.resume:
        raise ValueError("-e validates a classifier that was trained: name its checkpoint with --resume")
    if not 0 <= options.start_epoch < options.epochs:
        raise ValueError(f"--start-epoch {options.start_epoch} must lie below --epochs {options.epochs}")


def finish_options(options: argparse.Namespace) -> argparse.Namespace:
    """Fills in what follows from other flags. Raises ValueError for a resize that is smaller than the crop."""
    if options.resize is None:
        options.resize = round(options.image_size * 256 / 224)
    if options.resize < options.image_size:
        raise ValueError(f"--resize {options.resize} must be at least --image-size {options.image_size}")
    return options


def launch(argv: Sequence[str], module: str, *, counts_gpus: bool = False, node_batch: int | None = None) -> list[str]:
    """Starts the processes a command line asks for (and does not come back then), or returns it without those flags.

    counts_gpus: `-g N` and `--gpus N` mean N processes, as in the reference's k-NN; elsewhere --gpus lists ids.
    node_batch: see `launch_command`.
    Raises ValueError when N GPUs are asked for and fewer are there.
    """
    argv = list(argv)
    if counts_gpus:
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("-g", "--gpus", type=positive, default=1)
        first.add_argument("--device", default="auto")
        found, argv = first.parse_known_args(argv)
        argv += ["--device", found.device]
        if found.gpus > 1 and "LOCAL_RANK" not in os.environ:
            count = count_processes(found.gpus, found.device)
            if count < found.gpus:
                print(f"fastssl: no GPU: {count} processes, as many as cores, not {found.gpus}", file=sys.stderr)
            argv += ["--multiprocessing-distributed", "--gpus", *map(str, range(count))]
    return launch_if_asked(argv, module, node_batch)


def count_processes(gpus: int, device: str) -> int:
    """How many processes `-g N` means: N; without a GPU no more than cores, since the answer is the same.

    Raises ValueError when there are GPUs, but fewer.
    """
    have = torch.cuda.device_count()
    if device == "cuda" or (have and device == "auto"):
        if gpus > have:
            raise ValueError(f"-g {gpus} asks for {gpus} GPUs, this machine shows {have}")
        return gpus
    return min(gpus, usable_cores())
