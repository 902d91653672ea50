"""The flags that the evaluation commands share: the reference scripts' and a few of our own."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import torch

from fastssl.arguments import ListParser, integer, not_negative, numbers, positive, positive_float, rate
from fastssl.launch import launch_if_asked
from fastssl.machine.limits import usable_cores


def make_parser(command: str, description: str, *, batch_size: int, data: str) -> argparse.ArgumentParser:
    """A parser with the shared flags. batch_size: the reference script's default; data: what DIR is, for --help."""
    p = ListParser(
        prog=f"fastssl eval {command}",
        description=description,
        allow_abbrev=False,
        epilog="Several GPUs: torchrun --nproc_per_node N -m fastssl.eval.NAME ..., or --multiprocessing-distributed "
        "with --world-size, --rank and --dist-url; one GPU of several: --gpu I.",
    )
    add = p.add_argument
    add("data", metavar="DIR", help=data)
    add("-a", "--arch", help="backbone by name (default: the one the checkpoint names, else resnet50)")
    add("--stem", choices=("imagenet", "cifar"), help="its stem (default: what the checkpoint says or fits)")
    add("--pretrained", default="", metavar="PATH", help="checkpoint or run folder (default: random weights)")
    add("-b", "--batch-size", type=positive, default=batch_size, help=f"images per batch (default {batch_size})")
    add("-j", "--workers", "--num-workers", type=not_negative, metavar="N", help="decoding threads (default all cores)")
    add("--image-size", type=positive, default=224, metavar="PIXELS", help="side of the centre crop (default 224)")
    add("--resize", type=positive, metavar="PIXELS", help="short side before the crop (default 256/224 of it)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU if there is one")
    add("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="the encoder's arithmetic (default fp32)")
    add("--max-mem-gb", type=positive_float, metavar="GB", help="memory limit of each process; features may go to disk")
    add("--seed", type=integer, default=0, metavar="N", help="seed of every random choice (default 0)")
    add("--json", metavar="FILE", help="also write the results to this file")
    return p


def add_training_flags(p: argparse.ArgumentParser, *, print_freq: int) -> None:
    """The flags that the reference's linear and transfer scripts share."""
    add = p.add_argument
    add("--epochs", type=positive, default=100, metavar="N", help="epochs of training (default 100)")
    add("--start-epoch", type=int, default=0, metavar="N", help="first epoch, without --resume (default 0)")
    add("--lr", "--learning-rate", type=rate, default=30.0, metavar="LR", help="learning rate (default 30)")
    add("--schedule", type=int, nargs="*", default=[60, 80], help="epochs at which the rate drops (default 60 80)")
    add("--momentum", type=rate, default=0.9, metavar="M", help="momentum of SGD (default 0.9)")
    add("--wd", "--weight-decay", dest="weight_decay", type=rate, default=0.0, help="weight decay (default 0)")
    add("-p", "--print-freq", type=positive, default=print_freq, help=f"steps per log line (default {print_freq})")
    add("--resume", default="", metavar="PATH", help="continue from a checkpoint that this command wrote")
    add("-e", "--evaluate", action="store_true", help="only validate the classifier given by --resume")
    add("--output", metavar="DIR", help="folder of checkpoints (default: beside --pretrained, or that of --resume)")
    add(
        "--protocol",
        choices=("reference", "cached"),
        default="reference",
        help="reference: train on newly augmented images every epoch; cached: compute the features of centre crops "
        "once and train all settings on them together (default reference)",
    )
    add("--lrs", type=numbers, metavar="A,B,..", help="cached protocol: learning rates to try, not --lr")
    add("--wds", type=numbers, metavar="A,B,..", help="cached protocol: weight decays to try, not --wd")


def check_training_flags(options: argparse.Namespace) -> None:
    """Raises ValueError for flags that contradict each other."""
    swept = [flag for flag, value in (("--lrs", options.lrs), ("--wds", options.wds)) if value]
    if options.protocol == "reference" and swept:
        raise ValueError(f"{swept[0]} needs --protocol cached: add it, or give a single --lr and --wd")
    if options.protocol == "cached" and (options.resume or options.evaluate or options.output):
        raise ValueError("--protocol cached writes no checkpoints: leave out --resume, --evaluate and --output")
    if options.protocol == "cached" and options.start_epoch:
        raise ValueError("--protocol cached trains from the first epoch: leave out --start-epoch")
    if options.evaluate and not options.resume:
        raise ValueError("-e needs a trained classifier: give its checkpoint with --resume")
    if not 0 <= options.start_epoch < options.epochs:
        raise ValueError(f"--start-epoch {options.start_epoch} must lie between 0 and {options.epochs - 1}")


def finish_options(options: argparse.Namespace) -> argparse.Namespace:
    """Fills in the default of --resize. Raises ValueError when it is smaller than the crop."""
    if options.resize is None:
        options.resize = round(options.image_size * 256 / 224)
    if options.resize < options.image_size:
        raise ValueError(f"--resize {options.resize} must be at least --image-size {options.image_size}")
    return options


def launch(argv: Sequence[str], module: str, *, counts_gpus: bool = False, node_batch: int | None = None) -> list[str]:
    """The command line without its launch flags; if they ask for several processes, becomes torchrun instead.

    counts_gpus: `-g N` and `--gpus N` mean N processes, as in the reference's k-NN; elsewhere --gpus lists GPU ids.
    node_batch: see `launch_command`.
    Raises ValueError when the machine has fewer than N GPUs, but some.
    """
    argv = list(argv)
    if counts_gpus:
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("-g", "--gpus", type=positive, default=1)
        first.add_argument("--device", default="auto")
        found, argv = first.parse_known_args(argv)
        argv = ["--device", found.device, *argv]  # in front, since nothing behind a -- is a flag
        if found.gpus > 1 and "LOCAL_RANK" not in os.environ:
            count = count_processes(found.gpus, found.device)
            if count < found.gpus:
                print(
                    f"fastssl: no GPU here: running one process per core ({count}), not {found.gpus}", file=sys.stderr
                )
            argv = ["--multiprocessing-distributed", "--gpus", *map(str, range(count)), *argv]
    return launch_if_asked(argv, module, node_batch)


def count_processes(gpus: int, device: str) -> int:
    """How many processes `-g N` starts: N, but without a GPU at most one per core, since the results are the same.

    Raises ValueError when the machine has fewer than N GPUs, but some.
    """
    have = torch.cuda.device_count()
    if device == "cuda" or (have and device == "auto"):
        if gpus > have:
            raise ValueError(f"-g {gpus} asks for {gpus} GPUs, but this machine has {have}: lower -g, or --device cpu")
        return gpus
    return min(gpus, usable_cores())
