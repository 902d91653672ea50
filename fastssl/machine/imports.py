"""Tries to import libraries for `fastssl doctor`, in separate processes, so that a broken one cannot crash it."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from importlib import metadata
from types import ModuleType

REQUIRED = {  # module: its name for pip
    "torch": "torch",
    "torchvision": "torchvision",
    "numpy": "numpy",
    "PIL": "pillow",
    "llvmlite": "llvmlite",
    "tyro": "tyro",
    "yaml": "PyYAML",
    "tqdm": "tqdm",
    "tensorboard": "tensorboard",
    "matplotlib": "matplotlib",
    "sklearn": "scikit-learn",
    "safetensors": "safetensors",
    "timm": "timm",
}
BETON_DECODER = "fastssl.loaders.jpeg_decode"  # ours, but it needs the system's libturbojpeg
GROUPS = (tuple(REQUIRED), ("triton", BETON_DECODER), ("ffcv",), ("numba",), ("nvidia.dali",), ("apex.optimizers",))


def import_facts(module: str) -> dict[str, str]:
    """Imports a module: {"version": ...} and, for torch, facts about the GPUs; or {"error": one line}."""
    try:
        imported = importlib.import_module(module)
        facts = {"version": _version(imported)}
        if least := _asked_for(REQUIRED.get(module, ""), facts["version"]):
            return {"error": f"{facts['version']}, but {least} or later is needed"}
        return facts | _torch_facts(imported) if module == "torch" else facts
    except Exception as error:  # a broken library may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name in (module, module.split(".")[0]):
            return {"error": "not installed"}
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())}


def _version(module: ModuleType) -> str:
    if module.__name__ == "ffcv":  # 1.0.2 calls itself 0.0.3rc1
        return metadata.version("ffcv")
    return str(getattr(module, "__version__", "found"))


def _asked_for(package: str, version: str) -> str:
    """The version of a package that our installation asks for at least, if this one is older; else ""."""
    try:
        asked = metadata.requires("fastssl-pretrain") or ()
    except metadata.PackageNotFoundError:  # run from a clone
        return ""
    least = next((line.partition(">=")[2] for line in asked if re.fullmatch(rf"{package}>=[\d.]+", line)), "")
    wanted, found = ([int(n) for n in re.findall(r"\d+", text)] for text in (least, version))
    return least if found and found[: len(wanted)] < wanted else ""


def _torch_facts(torch: ModuleType) -> dict[str, str]:
    facts = {"cuda": torch.version.cuda or ""}
    with warnings.catch_warnings(record=True) as said:  # of GPUs that are too old, or too new
        warnings.simplefilter("always")
        try:
            torch.cuda.init()
        except Exception as error:
            facts["no_gpu"] = str(error).split(". ")[0]
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        facts["gpus"] = "; ".join(f"{g.name}, {g.total_memory / 2**30:.0f} GiB, sm_{g.major}{g.minor}" for g in gpus)
        facts["cudnn"] = str(torch.backends.cudnn.version())
        facts["warning"] = str(said[0].message).strip().splitlines()[0] if said else ""
    return facts


def try_imports(groups: Sequence[Sequence[str]] = GROUPS, timeout: float = 300) -> dict[str, dict[str, str]]:
    """`import_facts` of every module, with a process for each group, which may take `timeout` seconds."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONWARNINGS": "ignore"}
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "fastssl.machine.imports", *group],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for group in groups
    ]
    facts = {}
    for group, child in zip(groups, children):
        try:
            output, _ = child.communicate(timeout=timeout)
            failure = f"importing it ended Python with code {child.returncode}"
        except subprocess.TimeoutExpired:
            child.kill()
            output, _ = child.communicate()
            failure = f"importing it took over {timeout:.0f} s"
        facts |= {module: {"error": failure} for module in group}  # replaced below for modules that got a line
        lines = [line[1:].split(" ", 1) for line in output.splitlines() if line.startswith("@")]
        facts |= {module: json.loads(text) for module, text in lines}
    return facts


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"@{name} {json.dumps(import_facts(name))}", flush=True)
