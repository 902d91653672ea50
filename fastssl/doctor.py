"""`fastssl doctor`: what this machine has, what is missing, and the exact command that mends it.

Libraries are imported in processes of their own, so one that is broken (or crashes) is a line of the report. Exits
with 0 when training can run, with 1 when something it requires is missing or broken.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

OK, ABSENT, BROKEN = "ok", "absent", "broken"  # only `broken` stops training

REQUIRED = {  # module: what pip calls it
    "torch": "torch",
    "torchvision": "torchvision",
    "numpy": "numpy",
    "PIL": "pillow",
    "tyro": "tyro",
    "yaml": "PyYAML",
    "tqdm": "tqdm",
    "tensorboard": "tensorboard",
    "matplotlib": "matplotlib",
    "sklearn": "scikit-learn",
    "safetensors": "safetensors",
    "timm": "timm",
}
OPTIONAL = ("triton", "numba", "ffcv", "nvidia.dali", "apex.optimizers")
GROUPS = (tuple(REQUIRED), ("triton", "numba", "ffcv"), ("nvidia.dali",), ("apex.optimizers",))  # one process each
PIP = f"{sys.executable} -m pip install"


class Row(NamedTuple):
    """A line of the report; `mend` is a command, or a sentence where no command can do it."""

    name: str
    state: str
    detail: str
    mend: str = ""


def import_facts(module: str) -> dict[str, str]:
    """Imports a module; its version and what else the report wants to know, or the error in one line."""
    try:
        imported = importlib.import_module(module)
        facts = {"version": str(getattr(imported, "__version__", "found"))}
        if module == "torch":
            facts |= _torch_facts(imported)
    except Exception as error:  # whatever a broken library raises is what the report is for
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        absent = isinstance(error, ModuleNotFoundError) and error.name == module.split(".")[0]
        return {"absent": "not installed"} if absent else {"error": reason}
    return facts


def _torch_facts(torch) -> dict[str, str]:
    facts = {"cuda": torch.version.cuda or "", "cudnn": str(torch.backends.cudnn.version() or "")}
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        facts["gpus"] = "; ".join(f"{g.name}, {g.total_memory / 2**30:.0f} GiB, sm_{g.major}{g.minor}" for g in gpus)
    return facts


def probe(groups: tuple[tuple[str, ...], ...] = GROUPS, timeout: float = 120) -> dict[str, dict[str, str]]:
    """Facts of every module: each group is imported in a process of its own, all at once."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONWARNINGS": "ignore"}
    children = []
    for group in groups:
        command = [sys.executable, "-m", "fastssl.doctor", "--import", *group]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        children.append((group, subprocess.Popen(command, env=environment, **pipes)))
    facts = {}
    for group, child in children:
        try:
            output, ending = child.communicate(timeout=timeout)[0], f"the import ended Python with code {child.returncode}"
        except subprocess.TimeoutExpired:
            child.kill()
            output, ending = child.communicate()[0], f"the import took over {timeout:.0f} s"
        lines = [line[1:].split(" ", 1) for line in output.splitlines() if line.startswith("@")]
        facts |= {module: {"error": ending} for module in group} | {module: json.loads(text) for module, text in lines}
    return facts


def describe(facts: dict[str, str]) -> str:
    return facts.get("version") or facts.get("error") or facts["absent"]
