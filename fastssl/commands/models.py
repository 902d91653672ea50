"""`fastssl models`: lists the architectures with their size and the project whose definition they follow."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

from fastssl.models.encoders import list_architectures, make_backbone, source_of
from fastssl.models.tryout import build_without_memory


def main(argv: Sequence[str]) -> int:
    """Prints a line for each architecture, or for those whose name contains a given word."""
    parser = argparse.ArgumentParser(
        "fastssl models",
        description="List the architectures: weights, features, and the project whose definition they follow.",
        allow_abbrev=False,
    )
    parser.add_argument("word", nargs="?", default="", help="only names that contain this, such as mobilenet")
    word = parser.parse_args(list(argv)).word
    names = [name for name in list_architectures() if word in name]
    if not names:
        raise ValueError(f"no architecture has {word!r} in its name; for one of timm's, use timm:NAME")
    print(f"{'name':24}  {'M weights':>9}  {'features':>8}  source")
    for name in names:
        backbone, _, features = build_without_memory(partial(make_backbone, name))
        millions = sum(p.numel() for p in backbone.parameters()) / 1e6
        print(f"{name:24}  {millions:9.2f}  {features:8}  {source_of(name)}")
    return 0
