"""`fastssl recipes`: the recipes that come with the package, and what each is."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path

from fastssl.recipe import RECIPES, find_recipe


def main(argv: Sequence[str]) -> int:
    """Lists the recipes by name with their first line, or prints one."""
    parser = argparse.ArgumentParser(
        prog="fastssl recipes", description="List the recipes, or print one with its command, source and accuracy."
    )
    parser.add_argument("name", nargs="?", help="a recipe to print: by name, or the path of a YAML file")
    name = parser.parse_args(list(argv)).name
    print(find_recipe(name).read_text().rstrip() if name else as_list(sorted(RECIPES.glob("*.yaml"))))
    return 0


def as_list(paths: Sequence[Path]) -> str:
    """Each recipe's name and the first line of its header, as wide as the terminal."""
    indent, columns = 2 + max(len(path.stem) for path in paths), shutil.get_terminal_size().columns
    wrap = textwrap.TextWrapper(width=max(columns, indent + 30), subsequent_indent=" " * indent)
    lines = [wrap.fill(f"{path.stem:{indent}}{header(path)[0]}") for path in paths]
    return "\n".join([*lines, "", "fastssl recipes NAME prints one; fastssl pretrain DATA --config NAME runs it"])


def header(path: Path) -> list[str]:
    """The lines of the comment that a recipe begins with, without their mark."""
    lines = path.read_text().splitlines()
    length = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return [line.lstrip("#").strip() for line in lines[:length]]
