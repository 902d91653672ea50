"""The command `fastssl`: one line for each subcommand; what it does lies in its own module."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from fastssl.command import USAGE, run_command

COMMANDS = {  # in the order of a first day
    "demo": ("fastssl.demo", "render images, pretrain and evaluate: the whole chain in minutes, no data needed"),
    "doctor": ("fastssl.doctor", "what works on this machine, and the command that mends what does not"),
    "prep": ("fastssl.prep", "convert images to .beton files or tar shards, check and describe them"),
    "preview": ("fastssl.preview", "a picture of images beside their augmented views"),
    "pretrain": ("fastssl.train", "pretrain an encoder on a folder of images"),
    "recipes": ("fastssl.recipes_command", "list the recipes, each with its command, source and published accuracy"),
    "models": ("fastssl.list_models", "architectures: weights, features, whose definition"),
    "eval": ("fastssl.eval.__main__", "evaluate an encoder: k-NN, linear, transfer, instance discrimination, ..."),
    "export": ("fastssl.export", "an encoder for torchvision, timm, safetensors or MoCo's scripts"),
    "convert": ("fastssl.convert", "a SEED student, or any checkpoint, for MoCo's scripts"),
    "check-loader": ("fastssl.check_loader", "do the loaders keep their contract on these images?"),
    "check-augment": ("fastssl.check_augment", "our augmentation against Pillow and torchvision, in 1/255"),
}


def usage() -> str:
    """What `fastssl --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fastssl COMMAND [flags]",
            "",
            "Self-supervised pretraining of image encoders: MoCo with alignment, uniformity and contrastive losses.",
            "",
            *lines,
            "",
            "fastssl COMMAND --help explains a command; several GPUs: torchrun --nproc_per_node 8 -m fastssl.train ...",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else USAGE
    if argv[0] not in COMMANDS:
        close = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(COMMANDS)}"
        print(f"fastssl: error: no command {argv[0]!r}{hint}", file=sys.stderr)
        return USAGE
    module = COMMANDS[argv[0]][0]  # imported within: Ctrl-C may come in these seconds, too
    return run_command(lambda flags: importlib.import_module(module).main(flags), argv[1:])


if __name__ == "__main__":
    sys.exit(main())
