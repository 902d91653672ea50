"""What the machine says of its NVIDIA GPUs, whatever torch finds."""

from __future__ import annotations

import os
import sys
from pathlib import Path

DRIVER = ("/proc/driver/nvidia/version", "/usr/lib/wsl/lib/nvidia-smi")  # under Linux, and under Windows' WSL


def has_driver() -> bool:
    """Whether there is an NVIDIA driver, as where there are GPUs."""
    return any(Path(name).exists() for name in DRIVER)


def is_hidden() -> bool:
    """Whether CUDA_VISIBLE_DEVICES hides all GPUs."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")


def say_if_unused() -> None:
    """Prints, for a run on the CPU that was not asked for, that this machine seems to have a GPU."""
    if has_driver() and not is_hidden():
        print("on the CPU: torch finds no GPU beside this NVIDIA driver; `fastssl doctor` says why", file=sys.stderr)
