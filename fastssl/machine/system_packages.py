"""The command that installs what pip cannot: by apt-get on Debian and Ubuntu, by dnf on Red Hat's family."""

from __future__ import annotations

import shutil
import subprocess
import sys

HEADERS = f"python3.{sys.version_info.minor}-dev"
NAMES = {  # what it is: its name for apt-get, and for dnf
    "compilers": ("g++", "gcc-c++"),
    "Python.h": (HEADERS, f"{HEADERS}el"),
    "decoder": ("libturbojpeg0-dev", "turbojpeg"),  # without -dev it has one name on Debian, another on Ubuntu
    "pkg-config": ("pkg-config", "pkgconf-pkg-config"),
    "libturbojpeg": ("libturbojpeg0-dev", "turbojpeg-devel"),  # this one and the next by pkg-config's name
    "opencv4": ("libopencv-dev", "opencv-devel"),
}


def install_command(*wanted: str) -> str:
    """The command that installs these keys of NAMES."""
    manager = "dnf" if shutil.which("dnf") and not shutil.which("apt-get") else "apt-get"
    names = [NAMES[name][manager == "dnf"] for name in wanted]
    return f"sudo {manager} install -y {' '.join(names)}"


def missing_for_ffcv() -> list[str]:
    """Keys of NAMES: what FFCV's build lacks here."""
    if shutil.which("pkg-config") is None:
        return ["pkg-config", "libturbojpeg", "opencv4"]
    return [name for name in ("libturbojpeg", "opencv4") if subprocess.run(["pkg-config", "--exists", name]).returncode]
