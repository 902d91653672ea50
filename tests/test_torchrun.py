"""Real torchrun: a worker that is killed, a host whose name has no address."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from agents import ALONE, FLAGS, finish, losses, torchrun, wait_for_step, weights


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


def test_a_killed_worker_is_restarted_and_ends_with_the_same_weights(tmp_path):
    folder, undisturbed = tmp_path / "elastic", tmp_path / "undisturbed"
    finish(torchrun(f"{ALONE} --nproc_per_node 2", undisturbed))
    agent = torchrun(f"{ALONE} --nproc_per_node 2 --max-restarts 3", folder, "--resume", "auto")
    wait_for_step(agent, folder, 6)
    os.kill(worker(folder, rank=1), signal.SIGKILL)
    assert "resuming from" in finish(agent)
    assert losses(folder) == losses(undisturbed)
    assert weights(folder) == weights(undisturbed)


def test_several_processes_on_a_host_whose_name_has_no_address(tmp_path):
    """As in some containers: torchrun would look it up for five minutes, and then give up."""
    nameless = ["unshare", "--uts", "bash", "-c", 'hostname no-such-host.invalid && exec "$@"', "bash"]
    try:
        subprocess.run([*nameless, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs a host name of its own: {error}")
    command = [sys.executable, "-m", "fastssl", "pretrain", *FLAGS, "--output", str(tmp_path / "run")]
    done = subprocess.run(
        [*nameless, *command, "--steps", "1", "--multiprocessing-distributed", "--gpus", "0", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0 and "2 x cpu" in done.stdout, done.stdout
