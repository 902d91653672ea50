"""`fastssl prep subset`: makes a data set with some of another's classes out of links, such as ImageNet-100."""

from __future__ import annotations

import os
from pathlib import Path

from fastssl.data_prep.class_list import read_classes
from fastssl.data_prep.find import has_train_split
from fastssl.data_prep.splits import SPLITS


def make_subset(data: str | os.PathLike, out: str | os.PathLike, classes: str, force: bool = False) -> dict[str, int]:
    """Links the class folders of `data` into `out`; returns the number of classes of each split.

    `data` has train/<class>/ (and val/<class>/ ...), or <class>/ folders (of split ""). classes: see `read_classes`.
    force: removes the links of an earlier subset, and its split folders, from `out`, and never anything else.
    Raises ValueError, before anything is changed, for a wrong class list or an `out` that cannot be used.
    """
    data, out = Path(data).absolute(), Path(out)
    if not data.is_dir():
        raise ValueError(f"{data} is not a folder: give one with train/<class>/ or <class>/ folders")
    splits = [name for name in SPLITS if (data / name).is_dir()] if has_train_split(str(data)) else [""]
    for split in splits:
        if split not in ("", "train") and not any(name in _folders(data / "train") for name in _folders(data / split)):
            raise ValueError(
                f"{data / split} has none of the classes of train: sort its images into their folders, or give "
                f"{data / 'train'} instead"
            )
    wanted = {split: read_classes(classes, _folders(data / split), str(data / split)) for split in splits}
    if out.absolute() == data or data in out.absolute().parents:
        raise ValueError(f"{out} is inside {data}, and would become part of that data set: choose another folder")
    old_links = _old_links(out, force)
    for link in old_links:
        link.unlink()
    for folder in {link.parent for link in old_links} - {out}:  # an empty train/ would hide all other classes
        folder.rmdir()
    for split, names in wanted.items():
        (out / split).mkdir(parents=True, exist_ok=True)
        for name in names:
            (out / split / name).symlink_to(data / split / name, target_is_directory=True)
    return {split: len(names) for split, names in wanted.items()}


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _old_links(out: Path, force: bool) -> list[Path]:
    """The links of an earlier subset. Raises ValueError if `out` holds anything else, or anything without `force`."""
    if not out.exists():
        return []
    if not out.is_dir():
        raise ValueError(f"{out} is a file: name a folder")
    found: list[Path] = []
    for entry in out.iterdir():
        found += entry.iterdir() if _is_split(entry) else [entry]
    if real := [path for path in found if not path.is_symlink()]:
        raise ValueError(f"{real[0]} is not a link, so {out} was not made by this command: choose another folder")
    if found and not force:
        raise ValueError(f"{out} exists and is not empty: add --force to replace its links")
    return found


def _is_split(entry: Path) -> bool:
    return entry.name in SPLITS and entry.is_dir() and not entry.is_symlink()
