"""Real torchrun: a worker that is killed."""

import os
import signal
from pathlib import Path

from agents import finish, losses, torchrun, wait_for_step, weights


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
    finish(torchrun("--standalone --nproc_per_node 2", undisturbed))
    agent = torchrun("--standalone --nproc_per_node 2 --max-restarts 3", folder, "--resume", "auto")
    wait_for_step(agent, folder, 6)
    os.kill(worker(folder, rank=1), signal.SIGKILL)
    assert "resuming from" in finish(agent)
    assert losses(folder) == losses(undisturbed)
    assert weights(folder) == weights(undisturbed)
