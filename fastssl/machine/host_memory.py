"""Keeps the memory that a step on the CPU frees, because the next step needs as much and fresh pages cost time."""

from __future__ import annotations

import ctypes

# glibc's mallopt(3): the largest block taken from the heap (glibc allows 32 MB at most), and the free memory it keeps
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_BLOCK, _LARGEST_HEAP = 32 * 2**20, 2**31 - 1


def keep_freed_memory() -> bool:
    """Tells glibc to keep the memory of freed tensors (of up to 32 MB each) instead of returning it to the system.

    Memory that was returned comes back as pages that the system must first clear. Returns False for other C libraries,
    which have no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK) and mallopt(_TRIM_THRESHOLD, _LARGEST_HEAP))
