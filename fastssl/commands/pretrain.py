"""`fastssl pretrain`: reads the command line before it imports torch, so that help and a mistyped flag cost no wait."""

from __future__ import annotations

from collections.abc import Sequence

from fastssl.flags import parse_or_launch


def main(argv: Sequence[str]) -> int:
    """Parses the flags, then pretrains, as `python -m fastssl.train` does."""
    config = parse_or_launch(argv)
    from fastssl.train import pretrain  # imports torch, which takes seconds

    return pretrain(config)
