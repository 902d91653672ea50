"""A short run under torchrun, always the same, and what it leaves."""

import hashlib
import json
import subprocess
import time
from pathlib import Path

from fastssl import checkpoint

FLAGS = (
    "--loader synthetic --synthetic-images 48 --synthetic-size 40 -a mobilenetv3_small --image-size 32 -b 16 "
    "--queue-size 40 --dim 16 --epochs 4 --log-every 1 --save-every-epochs 4 --knn-every 0 --deterministic "
    "--device cpu --seed 3"
).split()
STEPS = 12


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


def worker(folder: Path, rank: int) -> int:
    """The process id of a rank of the run in `folder`."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
        except OSError:
            continue  # gone, or another user's
        if str(folder).encode() in command and f"\0RANK={rank}\0".encode() in b"\0" + environment:
            return int(entry.name)
    raise AssertionError(f"no process of rank {rank}")
