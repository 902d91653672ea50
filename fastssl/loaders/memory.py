"""Estimates how much memory decoded images need, and finds how much is free, before any image is decoded."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from fastssl.data_prep.decode import MAX_PIXELS, BadImage, open_file, read_file
from fastssl.data_prep.find import ImageFolder
from fastssl.data_prep.jpeg import NotPlain, read_jpeg_facts
from fastssl.machine.limits import free_memory

if TYPE_CHECKING:
    from fastssl.loaders.stream_loader import StreamLoader

SMALL = (1 / 8, 8e9)  # a small data set takes at most this share of the free memory, and this many bytes
_SAMPLED = 256  # images from whose sizes the size of all is estimated


def is_small(source: StreamLoader, device: torch.device) -> bool:
    """Whether the decoded images of a folder or a .beton file would take little memory on each rank, from a sample."""
    share, most = SMALL
    try:
        room = share * free_bytes(device) / copies(device)
    except OSError:  # the system does not say how much is free
        return False
    sampled = np.unique(np.linspace(0, source.num_images - 1, _SAMPLED).astype(np.int64))
    needed = source.decoder.pixel_bytes(sampled) / len(sampled) * source.num_images
    return needed <= min(most, room)


def copies(device: torch.device) -> int:
    """How many ranks of this machine would hold images in the same memory: all of them on a CPU, one on a GPU."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1


def folder_pixel_bytes(folder: ImageFolder, chosen: Iterable[int], workers: int) -> int:
    """The decoded size in bytes of the chosen images of a folder, from their headers, which threads read."""

    def pixel_bytes(i: int) -> int:
        path = folder.path(i)
        try:
            with open_file(path) as file, Image.open(file) as image:
                pixels = image.width * image.height
        except Exception:  # reported when it is decoded, but until then the loader reserves memory for a JPEG
            try:
                facts = read_jpeg_facts(read_file(path, path), header_only=True)
            except (BadImage, NotPlain):
                return 0
            pixels = facts.width * facts.height
        return pixels * 3 if pixels <= MAX_PIXELS else 0  # larger ones are not decoded

    with ThreadPoolExecutor(workers) as pool:
        return sum(pool.map(pixel_bytes, chosen))


def check_room(needed: int, device: torch.device, data: str, can_shard: bool) -> str:
    """Says how many of the free bytes are needed; raises ValueError when there are too few.

    can_shard: whether --resident-shard would help, as each of several ranks holds all images.
    """
    free, ranks = free_bytes(device), copies(device)
    together = f" for each of {ranks} ranks" if ranks > 1 else ""
    numbers = f"{needed / 1e9:.2f} GB{together} of {free / 1e9:.1f} GB free on {device}"
    if needed * ranks > free:
        shard = "--resident-shard, " if can_shard else ""
        raise ValueError(
            f"the decoded images of {data} do not fit into memory ({numbers}): use {shard}smaller images (fastssl prep "
            "beton --short-side), or --loader auto"
        )
    return numbers


def free_bytes(device: torch.device) -> int:
    """Bytes that can be allocated on a device; on the CPU without swapping, and within the process's limits."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
