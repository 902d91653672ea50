"""The flags that the stages step, all and peers share, and the configuration that follows from them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from fastssl.arguments import positive
from fastssl.config import Config, flat, replace
from fastssl.recipe import load_recipe

COMPILE = ("auto", "on", "graphs", "off")
SHARED = ("image_size", "batch_size", "queue_size", "head", "policy", "precision", "compile", "device")
# MoCo v2's loss and schedule, which are measured where no recipe is named
MOCO_V2 = {
    "contrast_weight": 1.0,
    "temperature": 0.2,
    "align_weight": 0.0,
    "uniform_weight": 0.0,
    "lr_schedule": "cosine",
}


def add_step_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that step, all and peers share."""
    cuda = torch.cuda.is_available()
    add = parser.add_argument
    add("--image-size", type=positive, default=224 if cuda else 64, help="views' side in pixels (default %(default)s)")
    add("--batch-size", type=positive, default=256 if cuda else 64, help="images per batch (default %(default)s)")
    add("--queue-size", type=positive, default=65536, help="rows of the queue (default 65536)")
    add("--head", default="simple", help="projection head (default simple)")
    add("--policy", default="v2", help="augmentation policy (default v2)")
    add("--precision", default="auto", help="as for fastssl pretrain (default auto)")
    add("--compile", default="auto", choices=COMPILE, help="as for fastssl pretrain (default auto)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: the GPU if there is one")
    add("--steps", type=positive, default=50 if cuda else 6, help="steps in a turn (default %(default)s)")
    add("--rounds", type=positive, default=7, help="turns of each contestant (default 7)")
    add("--output", type=Path, help="write the result to this JSON file")


def add_inner_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that step and all share, which look inside our step."""
    add = parser.add_argument
    text = "measure this recipe, by file or name, instead of MoCo v2's loss and schedule; other flags override it"
    add("--config", metavar="RECIPE", help=text)
    add("--profile", action="store_true", help="list the kernels that take longest")
    add("--no-eager", action="store_true", help="leave out the eager step")


def parse_flags(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """The command line; a recipe's settings stand in for flags that are not given. Adds `base`, a configuration."""
    args = parser.parse_args(argv)
    base = replace(Config(), **MOCO_V2)
    if getattr(args, "config", None):
        base = load_recipe(args.config)
        settings = flat(base)
        parser.set_defaults(arch=[base.model.arch], **{name: settings[name] for name in SHARED})
        args = parser.parse_args(argv)
    args.base = base
    return args


def make_config(args: argparse.Namespace, arch: str, **options: object) -> Config:
    """The base with the sizes of the command line, on synthetic images unless `options` differ."""
    settings = {name: getattr(args, name) for name in SHARED} | {
        "arch": arch,
        "loader": "synthetic",
        "synthetic_images": max(args.batch_size, min(512, 16 * args.batch_size)),
    }
    if args.base.model.stem == "cifar":  # such data sets have images of that size
        settings["synthetic_size"] = args.image_size
    return replace(args.base, **(settings | options))
