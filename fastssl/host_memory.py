"""What a step on the CPU frees stays with the process: the next step wants as much, and zeroed pages cost time."""

from __future__ import annotations

import ctypes

# glibc's mallopt(3): the largest block taken from the heap (more than 32 MB is refused), and what the heap may hold
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_BLOCK, _LARGEST_HEAP = 32 * 2**20, 2**31 - 1


def keep_freed_memory() -> bool:
    """Tells glibc to keep the memory of freed tensors (of at most 32 MB each) rather than return it to the system.

    Returned memory comes back as new pages, each of which the system clears at its first use. Returns whether it was
    done: other C libraries have no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK) and mallopt(_TRIM_THRESHOLD, _LARGEST_HEAP))
