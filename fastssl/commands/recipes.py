"""`fastssl recipes`: lists the recipes that come with the package, or prints one."""

from __future__ import annotations

import argparse
import itertools
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path

from fastssl.recipe import RECIPES, find_recipe


def main(argv: Sequence[str]) -> int:
    """Lists the recipes with the first line of each, or prints one."""
    parser = argparse.ArgumentParser(
        prog="fastssl recipes", description="List the recipes, or print one with its command, source and accuracy."
    )
    parser.add_argument("name", nargs="?", help="the recipe to print: its name, or the path of a YAML file")
    name = parser.parse_args(list(argv)).name
    if name:
        print(find_recipe(name).read_text("utf-8").rstrip())
    else:
        print(as_list(sorted(RECIPES.glob("*.yaml"))))
    return 0


def as_list(paths: Sequence[Path]) -> str:
    """The name of each recipe and the first line of its header, wrapped to the terminal."""
    indent, columns = 2 + max(len(path.stem) for path in paths), shutil.get_terminal_size().columns
    wrap = textwrap.TextWrapper(width=max(columns, indent + 30), subsequent_indent=" " * indent)
    lines = [wrap.fill(f"{path.stem:{indent}}{header(path)[0]}") for path in paths]
    return "\n".join([*lines, "", "fastssl recipes NAME prints a recipe; fastssl pretrain DATA --config NAME runs it."])


def header(path: Path) -> list[str]:
    """The lines of the comment at the top of a recipe, without their #."""
    comment = itertools.takewhile(lambda line: line.startswith("#"), path.read_text("utf-8").splitlines())
    return [line.lstrip("#").strip() for line in comment]
