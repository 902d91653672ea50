"""Which implementation of the views a device gets. All give the same bits on every device."""

from __future__ import annotations

import torch

from fastssl.compiled import numba_obstacle
from fastssl.triton_device import triton_obstacle

AUGMENT_KERNELS = ("auto", "triton", "numba", "reference")


def choose_augment_kernel(device: torch.device, requested: str = "auto") -> tuple[str, str]:
    """Its name, triton (fused.py), numba (compiled_views.py) or reference (views.py), and why in a few words.

    Raises ValueError when the one requested cannot run.
    """
    if requested not in AUGMENT_KERNELS:
        raise ValueError(f"unknown augmentation kernel {requested!r}: choose one of {', '.join(AUGMENT_KERNELS)}")
    if requested == "reference":
        return requested, "requested"
    if requested == "auto":  # on a CPU Triton may run too, interpreted, for tests
        fastest = "numba" if device.type == "cpu" else "triton"
        obstacle = _obstacle(fastest, device)
        return (fastest, f"on a {device.type.upper()}") if obstacle is None else ("reference", obstacle)
    if (obstacle := _obstacle(requested, device)) is not None:
        raise ValueError(f"the {requested} augmentation kernel cannot run ({obstacle}): take --augment-kernel auto")
    return requested, "requested"


def _obstacle(kernel: str, device: torch.device) -> str | None:
    """What keeps a kernel from a device, in a few words."""
    if kernel == "triton":
        return triton_obstacle(device)
    if device.type != "cpu":
        return f"numba's loops run on a CPU, not on {device.type}"
    return numba_obstacle()
