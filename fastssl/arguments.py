"""What argparse lacks: list flags that do not swallow the data set's path, and numbers within bounds.

argparse and tyro give a list flag every word up to the next flag. Here `--milestones 120 160 DATA` means
`DATA --milestones 120 160`: DATA cannot be an item, so it ends the list.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence

IsItem = Callable[[str], bool]  # whether a word can be an item of a list


def data_first(argv: Sequence[str], lists: Mapping[str, IsItem]) -> list[str]:
    """Moves the words that follow the end of a list to the front of `argv`.

    lists: for each list flag, the test of its items. The word right after the flag is always taken as an item, so that
    a misspelt item is reported as one.
    """
    front: list[str] = []
    rest: list[str] = []
    is_item: IsItem | None = None  # set while the words may be items of a list
    list_ended = False
    for i, word in enumerate(argv):
        if word == "--":
            return [*front, *rest, *argv[i:]]
        if word.startswith("-"):
            is_item, list_ended = lists.get(word), False
        elif is_item and argv[i - 1] not in lists and not is_item(word):
            is_item, list_ended = None, True
        if list_ended:
            front.append(word)
        else:
            rest.append(word)
    return front + rest


class ListParser(argparse.ArgumentParser):
    """argparse's parser, except that a list ends at the first word that is not of its type or among its choices."""

    def parse_known_args(self, args: Sequence[str], namespace: argparse.Namespace | None = None) -> tuple:
        """As in argparse, but `args` must be given."""
        lists = [action for action in self._actions if action.nargs in ("+", "*")]
        tests = {flag: item_test(action) for action in lists for flag in action.option_strings}
        return super().parse_known_args(data_first(args, tests), namespace)


def item_test(action: argparse.Action) -> IsItem:
    """A test of whether a word has the action's type and is one of its choices."""

    def is_item(word: str) -> bool:
        try:
            item = (action.type or str)(word)
        except (ValueError, argparse.ArgumentTypeError):
            return False
        return action.choices is None or item in action.choices

    return is_item


def integer(text: str) -> int:
    """An int that fits into 64 bits."""
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must fit into 64 bits, got {text}")
    return value


def positive(text: str) -> int:
    """An int >= 1."""
    value = integer(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def not_negative(text: str) -> int:
    """An int >= 0."""
    value = integer(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
    return value


def positive_float(text: str) -> float:
    """A finite float > 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be greater than 0, got {text}")
    return value


def rate(text: str) -> float:
    """A finite float >= 0."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
    return value


def numbers(text: str) -> list[float]:
    """Comma-separated finite floats >= 0."""
    return [rate(part) for part in text.split(",")]
