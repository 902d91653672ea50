"""`fastssl doctor`: what this machine has, what is missing, and the command that fixes it.

Exits with 0 when training can run, with 1 when something it requires is missing or broken.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from fastssl.machine import nvidia
from fastssl.machine.compilers import try_compiler
from fastssl.machine.imports import BETON_DECODER, REQUIRED, try_imports
from fastssl.machine.limits import MEMINFO, free_memory, usable_cores
from fastssl.machine.system_packages import install_command, missing_for_ffcv
from fastssl.plural import counted

OK, ABSENT, BROKEN = "ok", "absent", "broken"  # only BROKEN stops training
LOADERS = {
    "folder": ("torch", "PIL"),
    "synthetic": ("torch",),
    "resident": ("torch", "PIL"),
    "beton": ("torch", BETON_DECODER),
    "dali": ("torch", "nvidia.dali"),
}
PIP = f"{sys.executable} -m pip install"


class Row(NamedTuple):
    """A line of the report; `mend` is the command that fixes it, or a sentence where no command can."""

    name: str
    state: str
    detail: str
    mend: str = ""


def library_rows(facts: dict[str, dict[str, str]]) -> list[Row]:
    """Required libraries: a row each for the main three and for broken ones, one row for all the others."""
    rows, rest = [], []
    for module, package in REQUIRED.items():
        version = facts[module].get("version")
        if version is None:
            together = "torch torchvision" if package in ("torch", "torchvision") else package
            rows.append(Row(package, BROKEN, facts[module]["error"], f"{PIP} --upgrade {together}"))
        elif package in ("torch", "torchvision", "timm"):
            rows.append(Row(package, OK, version))
        else:
            rest.append(f"{package} {version}")
    return [*rows, Row("libraries", OK, ", ".join(rest))] if rest else rows


def gpu_rows(torch_facts: dict[str, str]) -> list[Row]:
    """The GPUs that torch sees, or why it sees none although there is an NVIDIA driver."""
    cuda = torch_facts.get("cuda")
    if gpus := torch_facts.get("gpus"):
        gpu = Row("GPU", OK, gpus)
        if warning := torch_facts["warning"]:
            ask = f"{sys.executable} -c 'import torch; torch.cuda.init()'  # says which build of torch supports it"
            gpu = Row("GPU", ABSENT, f"{gpus}; torch: {warning}", ask)
        return [gpu, Row("CUDA", OK, f"{cuda}, cuDNN {torch_facts['cudnn']}")]
    if not nvidia.has_driver():
        return [Row("GPU", OK, "none (no NVIDIA driver): training runs on the CPU")]
    if nvidia.is_hidden():
        return [Row("GPU", ABSENT, "hidden by CUDA_VISIBLE_DEVICES", "unset CUDA_VISIBLE_DEVICES")]
    if not cuda:
        return [Row("GPU", ABSENT, "torch was built without CUDA", f"{PIP} --force-reinstall torch torchvision")]
    why = torch_facts.get("no_gpu", "the driver may be too old for it")
    if "No CUDA GPUs" in why:
        given = "give this container or job its GPUs, as by docker run --gpus all, or sbatch --gres gpu:1"
        return [Row("GPU", ABSENT, f"torch: {why}", given)]
    older = f"{PIP} --force-reinstall --index-url https://download.pytorch.org/whl/cu126 torch torchvision"
    return [Row("GPU", ABSENT, f"CUDA {cuda} of torch does not start: {why}", older)]


def optional_rows(facts: dict[str, dict[str, str]]) -> list[Row]:
    """Optional libraries, and what each is good for."""
    dali = "130" if facts["torch"].get("cuda", "").startswith("13") else "120"
    apex = "build it from source, see https://github.com/NVIDIA/apex (PyPI's apex is another project)"
    home = "without root: conda-forge's libjpeg-turbo, its lib folder on LD_LIBRARY_PATH"
    turbojpeg = f"{install_command('decoder')}  # {home}"
    ffcv = f"{PIP} ffcv"
    if missing := missing_for_ffcv():
        ffcv = f"{install_command(*missing)} && {ffcv}"
    extras = [
        ("triton", "triton", "for the fused GPU kernels", f"{PIP} triton"),
        ("libjpeg-turbo", BETON_DECODER, "for .beton files, and for speed", turbojpeg),
        ("FFCV", "ffcv", "only for comparing speeds with it", ffcv),
        ("numba", "numba", "for fast views and k-NN on a CPU", f"{PIP} --upgrade numba"),
        ("DALI", "nvidia.dali", "for decoding on the GPU", f"{PIP} nvidia-dali-cuda{dali}"),
        ("NVIDIA apex", "apex.optimizers", "for its SGD, where it is faster than torch's", apex),
    ]
    rows = []
    for name, module, purpose, mend in extras:
        if version := facts[module].get("version"):
            rows.append(Row(name, OK, version))
        else:
            rows.append(Row(name, ABSENT, f"{facts[module]['error']} ({purpose})", mend))
    return rows


def loader_row(facts: dict[str, dict[str, str]]) -> Row:
    """The loaders whose libraries can be imported."""
    works = [name for name, needs in LOADERS.items() if all("version" in facts[module] for module in needs)]
    return Row("loaders", OK, ", ".join(works)) if works else Row("loaders", ABSENT, "none")


def compile_row() -> Row:
    """Whether small Python extensions can be built, in C as Triton does at run time, in C++ as torch.compile does."""
    mend = f"{install_command('compilers', 'Python.h')}  # without it a GPU trains more slowly"
    found = {language: try_compiler(language) for language in ("C", "C++")}
    if refusals := [reason for _, reason in found.values() if reason]:
        return Row("torch.compile", ABSENT, refusals[0], mend)
    compilers = " and ".join(compiler for compiler, _ in found.values())
    return Row("torch.compile", OK, f"{compilers} build Python extensions")


def machine_rows() -> list[Row]:
    """Python, operating system, cores, memory, disk and limits."""
    gib = 2**30
    version, where = platform.python_version(), sys.executable
    python = Row("Python", OK, f"{version} ({where})")
    if not (3, 10) <= sys.version_info[:2] <= (3, 14):
        python = Row(
            "Python", BROKEN, f"{version} ({where}); needs 3.10 to 3.14", "make clean && make PYTHON=python3.12"
        )
    rows = [python, Row("system", OK, platform.platform())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / gib
    cores = counted(usable_cores(), "core")
    free = f", {free_memory() / gib:.0f} free" if MEMINFO.exists() else ""
    rows.append(Row("machine", OK, f"{cores}, {memory:.0f} GiB of memory{free}"))
    rows.append(Row("disk", OK, f"{shutil.disk_usage('.').free / gib:.0f} GiB free here"))
    shm = shutil.disk_usage("/dev/shm").total / gib if Path("/dev/shm").exists() else 0.0
    grow = "" if shm >= 1 else "sudo mount -o remount,size=8G /dev/shm  # in Docker: docker run --shm-size=8g"
    rows.append(Row("shared memory", ABSENT if grow else OK, f"{shm:.2f} GiB (for batches between processes)", grow))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    raise_limit = "" if soft >= 1024 else f"ulimit -n {hard}"
    rows.append(Row("open files", ABSENT if raise_limit else OK, f"at most {soft}", raise_limit))
    return rows


def table(rows: list[Row], colour: bool) -> str:
    """The report as text: a line for each row, with the fix, if any, below it."""
    mark = {OK: "ok", ABSENT: "--", BROKEN: "!!"}
    paint = {OK: "\033[32m{}\033[0m", ABSENT: "\033[33m{}\033[0m", BROKEN: "\033[31m{}\033[0m"}
    width = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        sign = paint[row.state].format(mark[row.state]) if colour else mark[row.state]
        lines.append(f"{sign}  {row.name:<{width}}  {row.detail}")
        if row.mend:
            lines.append(f"    {'':<{width}}  -> {row.mend}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Prints the report; returns 0 when training can run, 1 when something it requires is broken."""
    parser = argparse.ArgumentParser(
        prog="fastssl doctor", description="Show what works on this machine, and the commands that fix what does not."
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    arguments = parser.parse_args(argv)
    facts = try_imports()
    rows = [*machine_rows(), *library_rows(facts), *gpu_rows(facts["torch"]), compile_row()]
    rows += [*optional_rows(facts), loader_row(facts)]
    can_train = all(row.state != BROKEN for row in rows)
    if arguments.json:
        print(json.dumps({"can_train": can_train, "rows": [row._asdict() for row in rows]}, indent=2))
    else:
        print(table(rows, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
        print("Training can run." if can_train else "Training cannot run: first fix what is marked !!.")
    return 0 if can_train else 1


if __name__ == "__main__":
    raise SystemExit(main())
