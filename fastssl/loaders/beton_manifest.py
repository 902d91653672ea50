"""What the manifest FILE.json beside a .beton file adds to it: class names, and how long the file must be."""

from __future__ import annotations

import json
import os

_KEYS = {"num_images", "class_names", "file_bytes"}


def read_manifest(path: str | os.PathLike) -> dict | None:
    """What `fastssl prep beton` wrote beside the file `path`, or None where there is no manifest.

    Raises ValueError when it cannot be read.
    """
    name = f"{os.fspath(path)}.json"
    if not os.path.exists(name):
        return None
    try:
        with open(name, encoding="utf-8") as file:
            manifest = json.load(file)
        if missing := _KEYS - set(manifest):
            raise ValueError(f"it has no {min(missing)}")
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"cannot read the manifest {name} ({error}): remove it, or convert the images again") from None
    return manifest
