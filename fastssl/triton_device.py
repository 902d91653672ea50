"""Tells whether our Triton kernels can run on a device."""

from __future__ import annotations

import importlib.util
import os

import torch


@torch.compiler.assume_constant_result
def triton_obstacle(device: torch.device) -> str | None:
    """Why they cannot run there, in a few words, or None. On a CPU they can with TRITON_INTERPRET=1, for tests."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "no CUDA device"
    if device.type not in ("cpu", "cuda"):
        return f"no kernel for {device.type}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None
