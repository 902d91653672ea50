"""--max-mem-gb: a process stays under its cap, and finds what it finds without one; a cap too small is one sentence."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastssl.eval.memory import GB, Memory, peak_memory

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def evaluate_in_a_process(more):
    """tests/capped.py -> what it prints."""
    command = [sys.executable, str(ROOT / "tests" / "capped.py"), more]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_process_stays_under_its_cap_and_finds_the_same():
    free = evaluate_in_a_process("none")  # first: it may compile loops, which takes 0.25 GB, and keeps them on disk
    capped = evaluate_in_a_process("0.3")
    assert capped["result"] == free["result"]
    assert capped["peak"] <= capped["cap"]
    assert free["peak"] > free["before"] + 0.3  # without a cap it takes more, so the cap was what held it back


def test_a_cap_too_small_says_what_would_do():
    cap = peak_memory() / GB + 0.2
    with pytest.raises(ValueError, match=r"--max-mem-gb \S+ is too little for 1\.00 GB of features .* give at least"):
        Memory(cap, torch.device("cpu")).check(GB, "features of a view set")
    Memory(None, torch.device("cpu")).check(GB, "features of a view set")
    with pytest.raises(ValueError, match=r"--max-mem-gb 0.01 is too little: .* give at least .*smaller --batch-size"):
        Memory(0.01, torch.device("cpu")).left()


def test_the_peak_is_this_programs_own():
    """What ran before it in the same process, as the parent of a fork does, is not counted."""
    ballast = torch.ones(GB // 4)  # 1 GB, held by the parent
    code = "from fastssl.eval.memory import peak_memory; print(peak_memory())"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert int(done.stdout) < peak_memory() and int(done.stdout) < 1.2 * GB and len(ballast)
