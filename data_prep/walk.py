"""Finds the image files below a folder, and says what else lies there."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

from fastssl.plural import counted

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".avif", ".bmp", ".gif")
EXTENSIONS += (".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx")
UNREAD = (".heic", ".heif", ".jxl", ".psd", ".svg", ".tga", ".exr", ".hdr", ".dcm", ".dng", ".cr2", ".cr3", ".nef")
UNREAD += (".arw", ".orf", ".raf", ".rw2", ".mp4", ".mov", ".avi", ".mkv", ".webm")  # pictures that nothing here reads


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return not name.startswith(".") and name.lower().endswith(EXTENSIONS)


def walk_images(
    folder: str, unread: Counter[str], prefix: str = "", above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[str]:
    """Relative paths of the images in a folder and below it, without following links back to a folder above.

    Counts in `unread` the pictures of other kinds.
    """
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in above:
        return
    above = above | {(status.st_dev, status.st_ino)}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                yield from walk_images(entry.path, unread, f"{prefix}{entry.name}/", above)
            elif is_image_name(entry.name):
                yield prefix + entry.name
            else:
                count_unread(entry.name, unread)


def count_unread(name: str, unread: Counter[str]) -> None:
    """Counts a file that is no image by its kind, if that is a kind of picture."""
    if (kind := os.path.splitext(name)[1].lower()) in UNREAD:
        unread[kind] += 1


def unread_notice(unread: Counter[str]) -> list[str]:
    """A sentence that counts the files of kinds that are not read, if there are any."""
    kinds = ", ".join(f"{kind} {number:,}" for kind, number in sorted(unread.items()))
    files = counted(unread.total(), "file of a kind that is not read", "files of kinds that are not read")
    return [f"passed over {files} ({kinds}): save them as JPEG or PNG to use them"] if unread else []


def explain_none(folder: str) -> str:
    """A sentence on what a folder without images holds, and what to give instead."""
    files, folders, tars, betons = Counter(), 0, "", []
    for where, folder_names, file_names in os.walk(folder):
        if not tars and any(name.endswith(".tar") for name in file_names):
            tars = where
        betons += [os.path.join(where, name) for name in file_names if name.endswith(".beton")]
        folders += len(folder_names)
        files.update((os.path.splitext(name)[1] or "no-extension") + " file" for name in file_names)
    kinds = files.most_common(3) + ([("folder", folders)] if folders else [])
    found = ", ".join(counted(number, kind) for kind, number in kinds)
    mend = "give a folder that holds images, <class>/ folders or train/<class>/ folders, with files named "
    mend += " ".join(EXTENSIONS)
    if betons:
        first = min(betons, key=lambda path: ("train" not in os.path.basename(path), path))
        mend = f"give a .beton file itself, as {first}"
    if tars:
        mend = f"fastssl prep beton converts the tar files in {tars}, and --loader dali reads them if they are shards"
    return f"{folder} holds no images ({f'only {found}' if found else 'it is empty'}): {mend}"


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself is treated as an unreadable file
        return False
