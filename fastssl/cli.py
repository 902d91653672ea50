"""The `fastssl` command: a table of subcommands, each of which is the `main` of its own module."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from fastssl.command import USAGE, refuse_word, run_command, usage

COMMANDS = {  # in the order a newcomer needs them
    "demo": ("fastssl.demo", "draw images, pretrain an encoder on them and evaluate it; takes minutes, needs no data"),
    "doctor": ("fastssl.doctor", "show what works on this machine, and the commands that fix what does not"),
    "prep": ("fastssl.commands.prep", "convert images to .beton files or tar shards, and check or describe such files"),
    "preview": ("fastssl.commands.preview", "draw images beside their augmented views"),
    "pretrain": ("fastssl.commands.pretrain", "pretrain an encoder on a folder of images"),
    "recipes": ("fastssl.commands.recipes", "list the recipes, or print one"),
    "models": ("fastssl.commands.models", "list the architectures with their numbers of weights and features"),
    "eval": ("fastssl.eval.__main__", "evaluate an encoder: k-NN, linear, transfer, instance discrimination, ..."),
    "export": ("fastssl.export", "write an encoder for torchvision, timm, safetensors or MoCo's scripts"),
    "convert": ("fastssl.commands.convert", "rewrite a SEED student, or any checkpoint, for MoCo's scripts"),
    "check-loader": ("fastssl.commands.check_loader", "check that the loaders keep their contract on your images"),
    "check-augment": ("fastssl.commands.check_augment", "compare our augmentation with Pillow's and torchvision's"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        about = "Self-supervised pretraining of image encoders: MoCo with alignment, uniformity and contrastive losses."
        texts = {name: text for name, (_, text) in COMMANDS.items()}
        flags = "Run fastssl COMMAND --help for the flags of a command."
        ranks = "To train on several GPUs, run torchrun --nproc_per_node 8 -m fastssl.train with the flags of pretrain."
        print(usage("fastssl COMMAND [flags]", about, texts, flags, ranks))
        return 0 if argv else USAGE
    if argv[0] not in COMMANDS:
        return refuse_word("command", argv[0], COMMANDS)
    module = COMMANDS[argv[0]][0]  # imported inside run_command, which handles a Ctrl-C in those seconds too
    return run_command(lambda flags: importlib.import_module(module).main(flags), argv[1:])


if __name__ == "__main__":
    sys.exit(main())
