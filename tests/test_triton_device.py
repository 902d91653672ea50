"""Whether Triton can start, asked of Triton itself beside a CUDA driver made for the test; without a compiler, say."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DRIVER = """
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
"""
ASK = """
import json, os, sys, torch
torch.cuda.is_available = lambda: True
from fastssl.machine.triton_device import compile_obstacle, triton_obstacle
for capability, environment in json.loads(sys.argv[1]):
    if os.fork() == 0:  # importing takes seconds, and what Triton has found out once it keeps
        os.environ |= environment
        torch.cuda.get_device_capability = lambda device=None: tuple(capability)
        print(json.dumps([ask(torch.device("cuda")) for ask in (triton_obstacle, compile_obstacle)]), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What the two questions are answered by new processes that find a GPU's driver, by what is wrong there."""
    pytest.importorskip("triton")
    if not (compiler := shutil.which("cc")):
        pytest.skip("needs a C compiler, for the driver")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "empty").mkdir()
    (folder / "file").write_text("")
    source = folder / "driver.c"
    source.write_text(DRIVER)
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", folder / "libcuda.so.1"], check=True)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TRITON_LIBCUDA_PATH": str(folder),
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "cache"),
    }
    for name in ("TRITON_INTERPRET", "CC"):  # Triton would look no further for a compiler
        environment.pop(name, None)
    cases = {
        "no compiler": ((9, 0), {"PATH": str(folder / "empty")}),
        "no folder": ((9, 0), {"TRITON_CACHE_DIR": str(folder / "file" / "cache")}),
        "an old GPU": ((6, 1), {"PATH": "/"}),
    }
    command = [sys.executable, "-c", ASK, json.dumps(list(cases.values()))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    return dict(zip(cases, map(json.loads, done.stdout.splitlines()), strict=True))


def test_without_a_compiler_nothing_is_compiled(answers):
    ours, torchs = answers["no compiler"]
    assert ours == torchs
    assert ours.startswith("Triton cannot start: RuntimeError: Failed to find C compiler")
    assert ours.endswith("; `fastssl doctor` tries the compiler")


def test_without_a_folder_to_keep_what_it_builds(answers):
    ours, torchs = answers["no folder"]
    assert ours == torchs and "NotADirectoryError" in ours


def test_a_gpu_that_is_too_old_is_not_asked(answers):
    assert answers["an old GPU"] == [
        "the GPU is older than compute capability 8.0",
        "the GPU is older than compute capability 7.0",
    ]
