"""`fastssl pretrain`: reads the command line before it imports torch: no wait for help, nor for a mistyped word."""

from __future__ import annotations

from collections.abc import Sequence

from fastssl.flags import parse_or_launch
from fastssl.loaders.choose import choose_loader


def main(argv: Sequence[str]) -> int:
    """Parses the flags, then pretrains, as `python -m fastssl.train` does."""
    config = parse_or_launch(argv)
    choose_loader(config.input.loader, config.data)  # refuses a path that does not exist
    from fastssl.train import pretrain  # imports torch, which takes seconds

    return pretrain(config)
