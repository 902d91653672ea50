"""The Slurm scripts as they are, with programs in the place of Slurm's that do as Slurm's do, and real torchrun.

Two processes each; that of the second node has rank 1 and local rank 0. A start costs many steps, so that two jobs go
through what happens to processes, and what a script alone decides is seen with a torchrun that trains nothing.
"""

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from agents import FLAGS, STEPS, finish, losses, wait_for_step, weights, worker
from ranks import free_port, run_ranks

from fastssl import checkpoint, train
from fastssl.command import run_command
from fastssl.recipe import RECIPES

TWO_NODES = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_CPUS_PER_TASK": "4"}
Nodes = tuple[str, dict[str, str], tuple[str, str], str]


def signal_step(tmp_path: Path, name: str) -> str:
    """A shell command that signals the processes of the step, which fake programs mark."""
    return f"grep -lzs '^STEP={tmp_path}$' /proc/[0-9]*/environ | cut -d/ -f3 | xargs -r kill -{name}"


def one_node(tmp_path: Path) -> subprocess.Popen:
    """The script for one node, which has two GPUs."""
    tools = {
        "scontrol": f'echo "$@" > {tmp_path}/asked',
        "torchrun": f'STEP={tmp_path} exec {sys.executable} -m torch.distributed.run "$@"',
    }
    return sbatch("one_node", tmp_path, tools, {"SLURM_GPUS_ON_NODE": "2"})


def many_nodes(tmp_path: Path, nodes: Nodes) -> subprocess.Popen:
    """The script for many nodes."""
    first, environment, commands, address = nodes
    tools = fake_cluster(tmp_path, first, commands, address)
    return sbatch("many_nodes", tmp_path, tools, TWO_NODES | environment)


# As Slurm's: every node's command at once; SIGTERM to srun itself kills them.
SRUN = """[ "$1" = --cpus-per-task=4 ] && shift
trap "{kill}" TERM
export STEP={tmp_path}
{nodes[0]} "$@" & first=$!
{nodes[1]} "$@" & second=$!
wait $first; code=$?
while kill -0 $first 2>/dev/null; do wait $first; code=$?; done
while kill -0 $second 2>/dev/null; do wait $second; done
exit $code"""


def fake_cluster(tmp_path: Path, first: str, nodes: tuple[str, str], address: str = "") -> dict[str, str]:
    """The programs of a cluster of two; `nodes` are the commands that run another one on a node.

    address: torchrun's options where the name of this host need not resolve, as those of real nodes do.
    """
    return {
        "scontrol": f'[ "$1" = show ] && echo {first} || echo "$@" > {tmp_path}/asked',
        "scancel": f'[ "$*" = "--signal=TERM 7" ] && {signal_step(tmp_path, "TERM")}',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run {address} "$@"',
        "srun": SRUN.format(nodes=nodes, tmp_path=tmp_path, kill=signal_step(tmp_path, "KILL")),
    }


def train_undisturbed(rank: int, world_size: int, folder: str) -> None:
    assert run_command(train.main, [*FLAGS, "--output", folder]) == 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The run folder of two processes that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed") / "slurm"
    run_ranks(train_undisturbed, 2, str(folder), timeout=300)
    return folder


def test_a_job_of_one_node_is_requeued_and_goes_on_without_a_worker(undisturbed, tmp_path):
    folder = tmp_path / "slurm"
    stop_and_requeue(one_node(tmp_path), tmp_path)
    job = one_node(tmp_path)
    wait_for_step(job, folder, losses(folder)[-1][0] + 1)
    os.kill(worker(folder, rank=1), signal.SIGKILL)
    assert finish(job).count("resuming from") == 2  # at the start, and when torchrun had started both once more
    assert not (tmp_path / "asked").exists()
    assert losses(folder) == losses(undisturbed)
    assert weights(folder) == weights(undisturbed)


def test_a_job_of_two_nodes_is_one_of_two_processes_requeued_and_cancelled(undisturbed, tmp_path, nodes):
    folder = tmp_path / "slurm"
    stop_and_requeue(many_nodes(tmp_path, nodes), tmp_path)
    before = losses(folder)
    cancel(many_nodes(tmp_path, nodes), tmp_path)
    after = losses(folder)
    assert before == losses(undisturbed)[: len(before)]
    assert len(after) > len(before) and after == losses(undisturbed)[: len(after)]


# Trains nothing: says that it began, and after SIGTERM takes a while to save. `wait` goes on when a signal has come.
FAKE_TORCHRUN = """trap 'sleep 0.5; touch {tmp_path}/saved; exit 1' TERM
touch {tmp_path}/began
[ -e {tmp_path}/short ] && exit 0
sleep 60 & wait"""


@pytest.mark.parametrize("script", ["one_node", "many_nodes"])
def test_a_cancelled_job_waits_for_its_processes_and_one_that_ends_is_not_requeued(script, tmp_path):
    tools = fake_cluster(tmp_path, "node-a", ("env", "env")) | {"torchrun": FAKE_TORCHRUN.format(tmp_path=tmp_path)}
    if script == "one_node":
        tools["torchrun"] = f'[ "$STEP" ] || STEP={tmp_path} exec "$0"\n{tools["torchrun"]}'
    job = sbatch(script, tmp_path, tools, TWO_NODES)
    while not (tmp_path / "began").exists():
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.02)
    subprocess.run(["bash", "-c", signal_step(tmp_path, "TERM")], check=True)
    job.send_signal(signal.SIGTERM)
    finish(job, 1)
    assert (tmp_path / "saved").exists() and not (tmp_path / "asked").exists()
    (tmp_path / "short").touch()
    finish(sbatch(script, tmp_path, tools, TWO_NODES))
    assert not (tmp_path / "asked").exists()


def stop_and_requeue(job: subprocess.Popen, tmp_path: Path) -> None:
    """Stops a job as Slurm does before the time limit."""
    folder = tmp_path / "slurm"
    wait_for_step(job, folder, 2)
    job.send_signal(signal.SIGUSR1)
    assert "stopped by a signal" in finish(job)
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    (tmp_path / "asked").unlink()
    assert_saved(folder)


def cancel(job: subprocess.Popen, tmp_path: Path) -> None:
    """Stops a job that continues as `scancel JOB` does, which signals the script and all that it has started."""
    folder = tmp_path / "slurm"
    wait_for_step(job, folder, losses(folder)[-1][0] + 1)
    subprocess.run(["bash", "-c", signal_step(tmp_path, "TERM")], check=True)
    job.send_signal(signal.SIGTERM)
    output = finish(job, 1)
    assert "resuming from" in output and "stopped by a signal" in output
    assert not (tmp_path / "asked").exists()
    assert_saved(folder)


def assert_saved(folder: Path) -> None:
    """The run was saved after its last step, and has more before it."""
    stopped_at = losses(folder)[-1][0]
    assert max(checkpoint.saved_steps(folder / "checkpoints")) == stopped_at < STEPS


@pytest.mark.parametrize("script", ["one_node", "many_nodes"])
def test_a_job_whose_program_is_missing_ends_with_that_code(script, tmp_path):
    """It may have ended before the script looks, hence several times."""
    for _ in range(8):
        job = sbatch(script, tmp_path, {"srun": "exec no-such-program"}, {"PATH": "/usr/bin:/bin"})
        assert "numeric argument" not in finish(job, 127)


def sbatch(script: str, tmp_path: Path, tools: dict[str, str], environment: dict[str, str]):
    """The script as it is, with these programs in front of the others, saving to tmp_path/slurm."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    for name, text in tools.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    environment = os.environ | {"SLURM_JOB_ID": "7", "OMP_NUM_THREADS": "1"} | environment
    environment["PATH"] = f"{tmp_path}/bin:{environment['PATH']}"
    command = ["bash", str(RECIPES / "slurm" / f"{script}.sbatch"), *FLAGS, "--output", str(tmp_path / "slurm")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    """What makes two nodes of this machine: (the first's name, variables, a command on each, torchrun's options).

    Where the machine permits it, each is on a network, a host name and an address of its own, with a cable between.
    """
    names = [f"fastssl-{os.getpid()}-{end}" for end in "ab"]
    try:
        if connect(names):
            hosts = tmp_path / "hosts"
            hosts.write_text("127.0.0.1 localhost\n10.77.0.1 node-a\n10.77.0.2 node-b\n")
            inside = f'mount --bind {hosts} /etc/hosts; hostname $0; exec "$@"'
            a, b = (
                f"ip netns exec {name} unshare --uts --mount sh -c '{inside}' node-{end}"
                for name, end in zip(names, "ab")
            )
            yield "node-a", {"SLURM_JOB_NODELIST": "node-[a-b]", "GLOO_SOCKET_IFNAME": "cable"}, (a, b), ""
        else:
            environment = {"SLURM_JOB_NODELIST": "node[1-2]", "RDZV_PORT": str(free_port())}
            yield "127.0.0.1", environment, ("env", "env"), "--local-addr localhost"
    finally:
        for name in names if shutil.which("ip") else ():
            ip("netns", "delete", name)


def connect(names: list[str]) -> bool:
    """Two network namespaces of these names and a cable between them, if this machine permits it."""
    if shutil.which("ip") is None or shutil.which("unshare") is None or not ip("netns", "add", names[0]):
        return False
    made = [ip("netns", "add", names[1])]
    made += [ip("-n", names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", names[1])]
    for number, name in enumerate(names, 1):
        made += [ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "cable")]
        made += [ip("-n", name, "link", "set", link, "up") for link in ("lo", "cable")]
    return all(made)


def ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True).returncode == 0
