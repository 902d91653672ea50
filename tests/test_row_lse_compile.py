"""The Triton kernels compiled for GPUs that are not here: no spilled register, and the tensor cores in use."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

KERNELS = [(80, "bf16", 128), (90, "bf16", 128), (100, "bf16", 128), (90, "fp16", 256), (80, "fp32", 64)]


@pytest.mark.parametrize(("arch", "dtype", "dim"), KERNELS)
def test_compiles_ahead_of_time_without_spilling(arch, dtype, dim):
    options = ["--arch", str(arch), "--dtype", dtype, "--dim", str(dim)]
    command = [sys.executable, "-m", "fastssl.bench.compile_loss", *options]
    compiled = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=compiled, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert [kernel["scales"] for kernel in kernels] == [1, 2]
    for kernel in kernels:
        assert kernel["spilled"] == 0
        assert kernel["shared"] <= {80: 163, 90: 227, 100: 227}[arch] * 1024
        if dtype != "fp32":  # float32 is multiplied in full unless the user allows TF32
            assert kernel[{80: "mma", 90: "wgmma", 100: "tcgen05"}[arch]] > 0
