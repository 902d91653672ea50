"""The Triton kernels compiled for GPUs that are not here: no spilled register, and the tensor cores in use."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import triton

from fastssl.bench import compile_loss, sweep_loss
from fastssl.kernels.row_lse_blocks import Blocks

LOSS = [(80, "bf16", 128), (90, "bf16", 128), (100, "bf16", 128), (90, "fp16", 256), (80, "fp32", 64)]
VIEWS = [(80, "bf16"), (90, "bf16"), (100, "bf16"), (90, "fp32"), (80, "fp16")]
# bytes a program may have; what is compiled for sm_80 also runs on GPUs with less than its 163 KB (8.6, 8.9, 12.x)
SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_CORES = {80: "mma", 90: "wgmma", 100: "tcgen05"}
# the commands' own main, one command line after the other: importing takes longer than compiling
COMMANDS = """
import json, sys
from fastssl.bench import compile_loss, compile_views
for name, flags in json.loads(sys.argv[1]):
    sys.argv[1:] = flags
    {"loss": compile_loss, "views": compile_views}[name].main()
    print()
"""


@pytest.fixture(scope="module")
def reports() -> dict[tuple, list[dict]]:
    """(arch, dtype) or (arch, dtype, dim) -> what the command said of each kernel, in a process that may compile."""
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        pytest.skip("needs Triton 3.6: 3.2 and 3.3 spill registers for sm_80, and 3.2 does not know sm_100")
    lines = [("loss", ["--arch", str(a), "--dtype", dtype, "--dim", str(dim)]) for a, dtype, dim in LOSS]
    lines += [("views", ["--arch", str(a), "--dtype", dtype]) for a, dtype in VIEWS]
    command = [sys.executable, "-c", COMMANDS, json.dumps(lines)]
    compiled = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=compiled, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = [list(map(json.loads, part.splitlines())) for part in done.stdout.split("\n\n")[:-1]]
    return dict(zip([*LOSS, *VIEWS], said, strict=True))


@pytest.mark.parametrize("case", LOSS, ids=str)
def test_the_loss_compiles_ahead_of_time_without_spilling(reports, case):
    arch, dtype, _ = case
    kernels = reports[case]
    assert all(kernel["spilled"] == 0 and kernel["shared"] <= SHARED[arch] for kernel in kernels)
    passes = [kernel for kernel in kernels if kernel["kernel"] == "_pass_over_queue"]
    assert [kernel["scales"] for kernel in passes] == [1, 2]
    if dtype != "fp32":  # float32 is multiplied in full unless the user allows TF32
        assert all(kernel[TENSOR_CORES[arch]] > 0 for kernel in passes)
    assert {kernel["kernel"] for kernel in kernels} >= {"_add_parts", "finish_rows", "finish_scalars"}


@pytest.mark.parametrize("case", VIEWS, ids=str)
def test_the_views_compile_ahead_of_time_without_spilling(reports, case):
    kernels = reports[case]
    launched = ["crop_tiles"] * 2 + ["jitter_rows"] + ["finish_tiles"] * 2 + ["normalise_rows"]
    assert [kernel["kernel"] for kernel in kernels] == launched
    assert all(kernel["spilled"] == 0 and kernel["shared"] <= SHARED[case[0]] for kernel in kernels)


def test_a_sweep_that_can_run_nothing_says_so(monkeypatch):
    monkeypatch.setattr(sweep_loss, "candidates", lambda: iter([Blocks(32, 32, 4, 2, 1)]))
    monkeypatch.setattr(sweep_loss, "time_blocks", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["sweep_loss"])
    with pytest.raises(SystemExit, match="this machine can run none of the candidates"):
        sweep_loss.main()


def test_a_triton_that_is_asked_in_another_way_is_named(monkeypatch):
    monkeypatch.delattr("triton.backends.nvidia.compiler.get_ptxas", raising=False)  # as in 3.2
    with pytest.raises(ValueError, match=r"needs Triton 3\.3"):
        compile_loss.compile_finish(80, 64)
