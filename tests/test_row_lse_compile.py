"""The Triton kernels compiled for GPUs that are not here: no spilled register, and the tensor cores in use."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

CASES = [(80, "bf16", 128), (90, "bf16", 128), (100, "bf16", 128), (90, "fp16", 256), (80, "fp32", 64)]
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may have
TENSOR_CORES = {80: "mma", 90: "wgmma", 100: "tcgen05"}


@pytest.mark.parametrize(("arch", "dtype", "dim"), CASES)
def test_compiles_ahead_of_time_without_spilling(arch, dtype, dim):
    options = ["--arch", str(arch), "--dtype", dtype, "--dim", str(dim)]
    command = [sys.executable, "-m", "fastssl.bench.compile_loss", *options]
    compiled = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=compiled, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(kernel["spilled"] == 0 and kernel["shared"] <= SHARED[arch] for kernel in kernels)
    passes = [kernel for kernel in kernels if kernel["kernel"] == "_pass_over_queue"]
    assert [kernel["scales"] for kernel in passes] == [1, 2]
    if dtype != "fp32":  # float32 is multiplied in full unless the user allows TF32
        assert all(kernel[TENSOR_CORES[arch]] > 0 for kernel in passes)
    assert {kernel["kernel"] for kernel in kernels} >= {"_add_parts", "finish_rows", "finish_scalars"}
