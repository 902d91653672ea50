"""What a result depends on besides its configuration: command, commit, versions and devices."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

from fastssl.machine.precision import bf16_unit


def environment() -> dict[str, object]:
    """The machine and the software of this process, as plain values."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],  # without the program's folder, which differs by machine
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "cpu": cpu_name(),
        "cpu_instructions": cpu_instructions(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
        "started": now(),
    }


def now() -> str:
    """The time, with its zone."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def commit() -> str | None:
    """The commit of the running source, with a + when files differ from it; None outside a git checkout."""
    source = Path(__file__).resolve().parent.parent
    if not (source / ".git").exists():
        return None
    git = ["git", "-C", str(source)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def cpu_name() -> str:
    """The processor's name from /proc/cpuinfo, or else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    for line in lines:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def cpu_instructions() -> str:
    """Those that torch computes with, such as AVX2, or AVX512 and AVX512-BF16: one name may stand for many CPUs."""
    return " and ".join(filter(None, (torch.backends.cpu.get_cpu_capability(), bf16_unit())))
