"""Chooses the implementation of the augmentation for a device. All implementations give the same bits."""

from __future__ import annotations

import torch

from fastssl.machine.compiled import numba_obstacle
from fastssl.machine.triton_device import triton_obstacle

AUGMENT_KERNELS = ("auto", "triton", "numba", "reference")


def choose_augment_kernel(device: torch.device, requested: str = "auto") -> tuple[str, str]:
    """(triton (fused.py), numba (compiled_views.py) or reference (views.py), why in a few words).

    Raises ValueError when the requested one cannot run.
    """
    if requested not in AUGMENT_KERNELS:
        raise ValueError(f"unknown augmentation kernel {requested!r}: choose one of {', '.join(AUGMENT_KERNELS)}")
    if requested == "reference":
        return requested, "requested"
    if requested == "auto":  # for tests, Triton's interpreter could run on a CPU too
        fastest = "numba" if device.type == "cpu" else "triton"
        obstacle = _obstacle(fastest, device)
        return (fastest, f"on a {device.type.upper()}") if obstacle is None else ("reference", obstacle)
    obstacle = _obstacle(requested, device)
    if obstacle is not None:
        raise ValueError(f"the {requested} augmentation kernel cannot run ({obstacle}): use --augment-kernel auto")
    return requested, "requested"


def _obstacle(kernel: str, device: torch.device) -> str | None:
    """Why a kernel cannot run on a device, in a few words, or None."""
    if kernel == "triton":
        return triton_obstacle(device)
    if device.type != "cpu":
        return f"numba's loops run on a CPU, not on {device.type}"
    return numba_obstacle()
