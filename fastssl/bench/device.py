"""The device that a benchmark runs on."""

from __future__ import annotations

import os

import torch

from fastssl.plural import counted

CPU = torch.device("cpu")


def open_device(name: str) -> torch.device:
    """The device called `name`, and makes it the current one, on which streams are made and graphs are captured.

    Raises ValueError for a device that is no CPU or GPU, and for a GPU that is not there.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: use cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                f"--device {name}: torch finds no GPU; run `fastssl doctor` to learn why, or use --device cpu"
            )
        if (device.index or 0) >= (gpus := torch.cuda.device_count()):
            raise ValueError(f"--device {name}: torch finds {counted(gpus, 'GPU')}, the last of them cuda:{gpus - 1}")
        torch.cuda.set_device(device.index or 0)
    return device


def silence_profiler() -> None:
    """On a CPU: torch's profiler would write to stderr whenever it starts and stops, and that it finds no GPU."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def wait(device: torch.device) -> None:
    """Until the device has done what it was told to do; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
