"""Which loader reads a data set. Without torch, so that a mistyped path is refused before seconds of imports."""

from __future__ import annotations

import difflib
import os

from fastssl.data_prep.tars import find_tars

LOADERS = ("folder", "beton", "dali", "resident", "synthetic")


def choose_loader(name: str, data: str | os.PathLike | None) -> tuple[str, str]:
    """(name of the loader, why it was chosen). Raises ValueError for an unknown name or missing data."""
    if name not in ("auto", *LOADERS):
        near = difflib.get_close_matches(name, ("auto", *LOADERS), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown loader {name!r}: {hint}choose from auto, {', '.join(LOADERS)}")
    if name == "synthetic":
        return name, "requested; reads no files"
    if not data:
        raise ValueError("no data set was given: name an image folder or a .beton file, or use --loader synthetic")
    if name != "auto":
        return name, "requested"
    if os.path.isdir(data) and find_tars(data):
        return "dali", f"{os.fspath(data)} is a folder of tar shards"
    if os.path.isfile(data) and os.fspath(data).endswith(".tar"):
        return "dali", f"{os.fspath(data)} is a tar shard"
    if os.path.isdir(data):
        return "folder", f"{os.fspath(data)} is a folder of image files"
    if os.path.isfile(data) and os.fspath(data).endswith(".beton"):
        return "beton", f"{os.fspath(data)} is a .beton file"
    what = "is a file that no loader reads" if os.path.exists(data) else "does not exist"
    raise ValueError(
        f"{os.fspath(data)} {what}: give a .beton file, a tar shard or a folder that holds images, <class>/ or "
        "train/<class>/ folders"
    )
