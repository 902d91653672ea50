"""A short run under torchrun, always the same, and what it leaves."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from fastssl import checkpoint

FLAGS = (
    "--loader synthetic --synthetic-images 48 --synthetic-size 40 -a resnet18 --image-size 32 -b 16 --queue-size 40 "
    "--dim 16 --epochs 4 --log-every 1 --save-every-steps 4 --knn-every 0 --deterministic --device cpu --seed 3"
).split()
STEPS = 12
ALONE = "--standalone --local-addr localhost"  # a single agent, on a host whose name need not resolve


def torchrun(launch: str, output: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", *launch.split(), "-m", "fastssl.train", *FLAGS]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--output", str(output), *flags],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip


def finish(process: subprocess.Popen, code: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def weights(folder: Path) -> str:
    """SHA-256 of the model in the newest checkpoint."""
    sha = hashlib.sha256()
    model = checkpoint.load(next(iter(checkpoint.saved_steps(folder / "checkpoints").values())))["model"]
    for name in sorted(model):
        sha.update(name.encode() + model[name].numpy().tobytes())
    return sha.hexdigest()


def wait_for_step(process: subprocess.Popen, folder: Path, step: int) -> None:
    while not ((folder / "metrics.jsonl").exists() and any(done >= step for done, _ in losses(folder))):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
