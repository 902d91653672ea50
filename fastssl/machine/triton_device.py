"""Tells whether Triton kernels, ours or those torch.compile writes, can run on a device."""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache

import torch

ABSENT = "Triton is not installed"


@torch.compiler.assume_constant_result
def triton_obstacle(device: torch.device) -> str | None:
    """Why they cannot run there, in a few words, or None. On a CPU they can with TRITON_INTERPRET=1, for tests."""
    if importlib.util.find_spec("triton") is None:
        return ABSENT
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "no CUDA device"
    if device.type not in ("cpu", "cuda"):
        return f"no kernel for {device.type}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return start_obstacle() if device.type == "cuda" else None


def compile_obstacle(device: torch.device) -> str | None:
    """Why torch.compile, which writes Triton kernels, cannot compile for a CUDA device, in a few words, or None."""
    if importlib.util.find_spec("triton") is None:
        return ABSENT
    if torch.cuda.get_device_capability(device) < (7, 0):
        return "the GPU is older than compute capability 7.0"
    return start_obstacle()


@lru_cache(maxsize=1)
def start_obstacle() -> str | None:
    """Why Triton cannot start on this machine's GPUs, or None.

    The first time Triton builds a small module in C: that takes a compiler, Python's headers and a folder to keep it.
    Containers for running programs, such as those of PyTorch without "devel" in their name, have no compiler.
    """
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    except Exception as error:  # of many kinds, by what is missing
        reason = " ".join(str(error).split())[:120]
        return f"Triton cannot start: {type(error).__name__}: {reason}; `fastssl doctor` tries the compiler"
    return None
