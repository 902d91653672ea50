"""Real torchrun: agents on one or two nodes, a worker that is killed, and the Slurm script that is stopped."""

import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastssl import checkpoint
from fastssl.recipe import RECIPES
from tests.ranks import free_port

FLAGS = (
    "--loader synthetic --synthetic-images 48 --synthetic-size 40 -a resnet18 --image-size 32 -b 16 --queue-size 40 "
    "--dim 16 --epochs 6 --log-every 1 --save-every-steps 4 --knn-every 0 --deterministic --device cpu --seed 3"
).split()
STEPS = 18
NODE = "--nnodes 2 --nproc_per_node 2 --rdzv_backend c10d --rdzv_id test"


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


@pytest.fixture(scope="module")
def one_agent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torchrun") / "one"
    finish(torchrun("--standalone --nproc_per_node 4", folder))
    return folder


def test_two_agents_of_two_are_one_agent_of_four(one_agent, tmp_path):
    folder, where = tmp_path / "two", f"--rdzv_endpoint 127.0.0.1:{free_port()}"
    agents = [torchrun(f"{NODE} {where}", folder) for _ in range(2)]
    for agent in agents:
        finish(agent)
    assert len(losses(folder)) == STEPS
    assert losses(folder) == losses(one_agent)
    assert weights(folder) == weights(one_agent)


def test_a_killed_worker_is_restarted_and_ends_with_the_same_weights(one_agent, tmp_path):
    folder = tmp_path / "elastic"
    agent = torchrun("--standalone --nproc_per_node 4 --max-restarts 3", folder, "--resume", "auto")
    wait_for_step(agent, folder, 6)
    os.kill(worker(folder, rank=2), signal.SIGKILL)
    assert "going on from" in finish(agent)
    assert losses(folder) == losses(one_agent)
    assert weights(folder) == weights(one_agent)


def test_the_slurm_script_saves_and_asks_to_be_requeued(tmp_path):
    """The script as it is, with a scontrol that only notes what it was asked."""
    folder, tools = tmp_path / "slurm", tmp_path / "bin"
    tools.mkdir()
    for name, text in {
        "scontrol": f'echo "$@" > {tmp_path}/asked',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod((tools / name).stat().st_mode | stat.S_IXUSR)
    environment = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "2", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = ["bash", str(RECIPES / "slurm" / "one_node.sbatch"), *FLAGS, "--output", str(folder)]

    def sbatch() -> subprocess.Popen:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)

    job = sbatch()
    wait_for_step(job, folder, 5)
    job.send_signal(signal.SIGTERM)
    assert "stopped by a signal" in finish(job)
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    stopped_at = losses(folder)[-1][0]
    assert max(checkpoint.saved_steps(folder / "checkpoints")) == stopped_at < STEPS
    assert "going on from" in finish(sbatch())
    assert [step for step, _ in losses(folder)] == list(range(1, STEPS + 1))


def test_the_many_node_script_is_valid_bash():
    for path in (RECIPES / "slurm").glob("*.sbatch"):
        assert subprocess.run(["bash", "-n", str(path)], capture_output=True).stderr == b""
