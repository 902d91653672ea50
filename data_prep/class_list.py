"""Reads a list of classes: from a file, from the command line, or ImageNet-100 by name."""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

# The 100 classes of Contrastive Multiview Coding (arXiv 1906.05849), which most papers mean by ImageNet-100
IMAGENET100 = Path(__file__).with_name("imagenet100.txt")
_WORDNET = re.compile(r"n\d{8}")


def read_classes(classes: str, existing: Sequence[str], where: str) -> list[str]:
    """The class names that `classes` stands for: a file with a name per line, names separated by commas, "imagenet100".

    Empty lines and lines that begin with # are ignored. `existing` are the classes that the folder `where` has.
    Raises ValueError for a name that occurs twice, that does not exist, or that is not a WordNet id although all
    existing ones are.
    """
    origin = IMAGENET100 if classes == "imagenet100" else Path(classes)
    names = classes.split(",")
    if os.path.isfile(origin):  # unlike Path's own, it takes a list of names, which may be too long for a path
        try:
            lines = list(enumerate(origin.read_text("utf-8-sig").splitlines(), 1))  # some editors write a BOM
        except UnicodeDecodeError:
            raise ValueError(f"{origin} is not a text file: give one with a class per line") from None
    elif (origin.suffix or "/" in classes) and set(existing).isdisjoint(name.strip() for name in names):
        raise ValueError(f"the class list {classes} does not exist: give a file, names or imagenet100")
    else:
        origin, lines = "--classes", list(enumerate(names, 1))
    named = [(number, text.strip()) for number, text in lines if text.strip() and not text.startswith("#")]
    if not named:
        raise ValueError(f"{origin} names no classes")
    if all(map(_WORDNET.fullmatch, existing)):
        for number, name in named:
            if not _WORDNET.fullmatch(name):
                raise ValueError(f"{origin}, entry {number}: {name!r} is not a WordNet id such as n02869837")
    names = [name for _, name in named]
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise ValueError(f"{origin} names {twice[0]} twice: remove one of them")
    known = set(existing)
    if missing := [name for name in names if name not in known]:
        near = difflib.get_close_matches(missing[0], existing, n=1)
        hint = f"; did you mean {near[0]}?" if near else ": name some that it has with --classes"
        more = f" (it lacks {len(missing)} of them)" if len(missing) > 1 else ""
        raise ValueError(f"{where} has no class {missing[0]}, which {origin} names{more}{hint}")
    return names
