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
import json, torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda device=None: {capability}
from fastssl.machine.triton_device import compile_obstacle, triton_obstacle
print(json.dumps([ask(torch.device("cuda")) for ask in (triton_obstacle, compile_obstacle)]))
"""


def ask(folder, capability=(9, 0), **environment):
    """What the two questions are answered by a new process that finds a GPU's driver."""
    pytest.importorskip("triton")
    if not (compiler := shutil.which("cc")):
        pytest.skip("needs a C compiler, for the driver")
    source = folder / "driver.c"
    source.write_text(DRIVER)
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", folder / "libcuda.so.1"], check=True)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TRITON_LIBCUDA_PATH": str(folder),
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "cache"),
        **environment,
    }
    for name in ("TRITON_INTERPRET", "CC"):  # Triton would look no further for a compiler
        environment.pop(name, None)
    command = [sys.executable, "-c", ASK.format(capability=capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    return json.loads(done.stdout.splitlines()[-1])


def test_without_a_compiler_nothing_is_compiled(tmp_path):
    (tmp_path / "empty").mkdir()
    ours, torchs = ask(tmp_path, PATH=str(tmp_path / "empty"))
    assert ours == torchs
    assert ours.startswith("Triton cannot start: RuntimeError: Failed to find C compiler")
    assert ours.endswith("; `fastssl doctor` tries the compiler")


def test_without_a_folder_to_keep_what_it_builds(tmp_path):
    (tmp_path / "file").write_text("")
    ours, torchs = ask(tmp_path, TRITON_CACHE_DIR=str(tmp_path / "file" / "cache"))
    assert ours == torchs and "NotADirectoryError" in ours


def test_a_gpu_that_is_too_old_is_not_asked(tmp_path):
    assert ask(tmp_path, (6, 1), PATH="/") == [
        "the GPU is older than compute capability 8.0",
        "the GPU is older than compute capability 7.0",
    ]
