"""`fastssl prep subset`: a data set with some of another's classes, made of links: ImageNet-100 in a moment."""

from __future__ import annotations

import os
from pathlib import Path

from fastssl.data_prep.class_list import read_classes
from fastssl.data_prep.images import has_train_split

_SPLITS = ("train", "val", "valid", "validation", "test")


def make_subset(data: str | os.PathLike, out: str | os.PathLike, classes: str, force: bool = False) -> dict[str, int]:
    """Links the class folders of `data` into `out`, split by split; the number of classes of each split.

    `data` has train/<class>/ (and val/<class>/ ...), or <class>/ at its top (the split is then ""). `classes` is what
    `read_classes` takes. `force` removes the links of an earlier subset in `out`; what is no link is never touched.
    Raises ValueError for a class list that is wrong or names what does not exist, and when `out` is in the way.
    Nothing is made unless everything can be.
    """
    data, out = Path(data).absolute(), Path(out)
    if not data.is_dir():
        raise ValueError(f"{data} is no folder: give a folder with train/<class>/ or <class>/ folders")
    splits = [name for name in _SPLITS if (data / name).is_dir()] if has_train_split(str(data)) else [""]
    wanted = {split: read_classes(classes, _folders(data / split), str(data / split)) for split in splits}
    if out.absolute() == data or data in out.absolute().parents:
        raise ValueError(f"{out} lies inside {data}: the subset would become part of what it is made from")
    old = _old_links(out, force)
    for link in old:
        link.unlink()
    for split, names in wanted.items():
        (out / split).mkdir(parents=True, exist_ok=True)
        for name in names:
            (out / split / name).symlink_to(data / split / name, target_is_directory=True)
    return {split: len(names) for split, names in wanted.items()}


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _old_links(out: Path, force: bool) -> list[Path]:
    """The links of an earlier subset; raises ValueError where `out` holds anything else, or anything without force."""
    if not out.exists():
        return []
    if not out.is_dir():
        raise ValueError(f"{out} is a file: name a folder")
    found = [path for entry in out.iterdir() for path in ([entry] if not _is_split(entry) else list(entry.iterdir()))]
    if real := [path for path in found if not path.is_symlink()]:
        raise ValueError(f"{real[0]} is no link, so {out} is no subset made by this command: choose another folder")
    if found and not force:
        raise ValueError(f"{out} exists and is not empty: --force replaces its links")
    return found


def _is_split(entry: Path) -> bool:
    return entry.name in _SPLITS and entry.is_dir() and not entry.is_symlink()
