"""What argparse lacks: lists that end where their items end, and numbers within bounds.

argparse and tyro give a flag that takes a list every word up to the next flag, the data set's place too. Here
`--milestones 120 160 DATA` is `DATA --milestones 120 160`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence

Fits = Callable[[str], bool]  # whether a word can be an item


def data_first(argv: Sequence[str], lists: Mapping[str, Fits]) -> list[str]:
    """`argv` with the words that end a list moved to its front. `lists`: what can be an item, by flag.

    A list's first word is always its own, so that a misspelt item is named as one.
    """
    first: list[str] = []
    rest: list[str] = []
    fits: Fits | None = None
    for i, word in enumerate(argv):
        if word == "--":
            return [*first, *rest, *argv[i:]]
        if word.startswith("-"):
            fits = lists.get(word)
        elif fits and argv[i - 1] not in lists and not fits(word):
            fits = never
        (first if fits is never else rest).append(word)
    return first + rest


def never(word: str) -> bool:
    """The list has ended."""
    return False


class ListParser(argparse.ArgumentParser):
    """argparse's parser, but its lists end where their type or their choices do."""

    def parse_known_args(self, args: Sequence[str], namespace: argparse.Namespace | None = None) -> tuple:
        """As argparse's, of words that are given."""
        lists = [action for action in self._actions if action.nargs in ("+", "*")]
        fits = {flag: item_test(action) for action in lists for flag in action.option_strings}
        return super().parse_known_args(data_first(args, fits), namespace)


def item_test(action: argparse.Action) -> Fits:
    """Whether a word is of the action's type, and one of its choices."""

    def fits(word: str) -> bool:
        try:
            item = (action.type or str)(word)
        except (ValueError, argparse.ArgumentTypeError):
            return False
        return action.choices is None or item in action.choices

    return fits


def positive(text: str) -> int:
    """An int of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def positive_float(text: str) -> float:
    """A float above 0, not infinite."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    return value


def rate(text: str) -> float:
    """A float of at least 0, not infinite."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text}")
    return value


def numbers(text: str) -> list[float]:
    """Comma-separated rates."""
    return [rate(part) for part in text.split(",")]
