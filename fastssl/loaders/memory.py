"""How much memory images need and how much is free, before the first is decoded."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from fastssl.data_prep.images import MAX_PIXELS, ImageFolder, open_file

if TYPE_CHECKING:
    from fastssl.loaders.beton_loader import BetonLoader
    from fastssl.loaders.folder_loader import FolderLoader


SMALL = (1 / 8, 8e9)  # at most this part of the free memory, and so many bytes: some seconds of decoding
_LOOKED_AT = 256  # images whose sizes tell those of all


def is_small(source: FolderLoader | BetonLoader, device: torch.device) -> bool:
    """Whether the images, once decoded, take little memory of each rank, by the sizes of some."""
    part, most = SMALL
    try:
        room = part * free_bytes(device) / copies(device)
    except OSError:  # a system that does not tell
        return False
    some = np.unique(np.linspace(0, source.num_images - 1, _LOOKED_AT).astype(np.int64))
    needed = source.pixel_bytes(some) / len(some) * source.num_images
    return needed <= min(most, room)


def copies(device: torch.device) -> int:
    """How many ranks of this machine hold their images side by side: those that hold them in host memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1


def folder_pixel_bytes(folder: ImageFolder, chosen: Iterable[int], workers: int) -> int:
    """Bytes of the chosen images of a folder once they are decoded, read from their headers by threads."""

    def pixel_bytes(i: int) -> int:
        try:
            with open_file(folder.path(i)) as file, Image.open(file) as image:
                pixels = image.width * image.height
        except Exception:  # whatever is wrong with it is told when it is decoded
            return 0
        return pixels * 3 if pixels <= MAX_PIXELS else 0  # more are not decoded

    with ThreadPoolExecutor(workers) as pool:
        return sum(pool.map(pixel_bytes, chosen))


def check_room(needed: int, device: torch.device, data: str, can_shard: bool) -> str:
    """A clause that tells `needed` bytes from the free ones; raises ValueError when there are not so many.

    can_shard: several ranks each hold all images and need not.
    """
    free, ranks = free_bytes(device), copies(device)
    together = f" for each of {ranks} ranks" if ranks > 1 else ""
    numbers = f"{needed / 1e9:.2f} GB{together} of {free / 1e9:.1f} GB free on {device}"
    if needed * ranks > free:
        mend = "--resident-shard, " if can_shard else ""
        raise ValueError(
            f"the images of {data} do not fit into memory once they are decoded, {numbers}: use {mend}images of a "
            "shorter side (fastssl prep beton --short-side), or --loader beton"
        )
    return numbers


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device; on the CPU without swapping, within all limits that are set."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo", encoding="ascii") as file:
        facts = dict(line.split(":", 1) for line in file)
    free = int(facts["MemAvailable"].split()[0]) * 1024
    most = resource.getrlimit(resource.RLIMIT_AS)[0]  # of this process (ulimit -v)
    if most != resource.RLIM_INFINITY:
        with open("/proc/self/statm", encoding="ascii") as file:
            free = min(free, most - int(file.read().split()[0]) * resource.getpagesize())
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            limit = int(file.read())  # "max" where there is none
        with open("/sys/fs/cgroup/memory.current", encoding="ascii") as file:
            used = int(file.read())
        with open("/sys/fs/cgroup/memory.stat", encoding="ascii") as file:
            used -= int(dict(line.split() for line in file)["inactive_file"])  # files' pages make room when asked
    except (OSError, ValueError, KeyError):  # no container, or one without a limit
        return free
    return min(free, max(0, limit - used))
