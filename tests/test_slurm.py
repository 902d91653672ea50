"""The Slurm scripts as they are, with programs in the place of Slurm's that do as Slurm's do, and real torchrun.

Two processes each; that of the second node has rank 1 and local rank 0.
"""

import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from agents import ALONE, FLAGS, STEPS, finish, losses, torchrun, wait_for_step, weights
from ranks import free_port

from fastssl import checkpoint
from fastssl.recipe import RECIPES

TWO_NODES = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_CPUS_PER_TASK": "4"}


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


def many_nodes(tmp_path: Path) -> subprocess.Popen:
    """The script for many nodes, with two on this machine."""
    environment = TWO_NODES | {"SLURM_JOB_NODELIST": "node[1-2]", "RDZV_PORT": str(free_port())}
    tools = fake_cluster(tmp_path, "127.0.0.1", ("env", "env"), "--local-addr localhost")
    return sbatch("many_nodes", tmp_path, tools, environment)


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


@pytest.fixture(scope="module")
def one_agent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torchrun") / "one"
    finish(torchrun(f"{ALONE} --nproc_per_node 2", folder))
    return folder


def test_the_one_node_script_saves_and_asks_to_be_requeued(one_agent, tmp_path):
    """The script as it is, with a scontrol that only notes what it was asked."""
    folder = stop_and_requeue(partial(one_node, tmp_path), tmp_path)
    assert losses(folder) == losses(one_agent)
    assert weights(folder) == weights(one_agent)


def test_the_many_node_script_on_one_machine_is_one_agent_of_two(one_agent, tmp_path):
    """Two agents of a process each, started by the script as it is with an srun that knows two "nodes"."""
    folder = stop_and_requeue(partial(many_nodes, tmp_path), tmp_path)
    assert losses(folder) == losses(one_agent)
    assert weights(folder) == weights(one_agent)


def test_the_many_node_script_in_two_network_namespaces(one_agent, tmp_path, two_nodes):
    """Each agent on a network, a host name and an address of its own, with a cable between them."""
    tools = fake_cluster(tmp_path, "node-a", two_nodes)
    environment = TWO_NODES | {"SLURM_JOB_NODELIST": "node-[a-b]", "GLOO_SOCKET_IFNAME": "cable"}
    job = sbatch("many_nodes", tmp_path, tools, environment)
    finish(job)
    assert losses(tmp_path / "slurm") == losses(one_agent)
    assert weights(tmp_path / "slurm") == weights(one_agent)


@pytest.mark.parametrize("start", [one_node, many_nodes])
def test_a_cancelled_job_saves_and_is_not_requeued(start, tmp_path):
    """`scancel JOB` signals the script and all that it has started."""
    folder, job = tmp_path / "slurm", start(tmp_path)
    wait_for_step(job, folder, 5)
    subprocess.run(["bash", "-c", signal_step(tmp_path, "TERM")], check=True)
    job.send_signal(signal.SIGTERM)
    assert "stopped by a signal" in finish(job, 1)
    assert max(checkpoint.saved_steps(folder / "checkpoints")) == losses(folder)[-1][0]
    assert not (tmp_path / "asked").exists()


@pytest.mark.parametrize("script", ["one_node", "many_nodes"])
def test_a_job_whose_program_is_missing_ends_with_that_code(script, tmp_path):
    """It may have ended before the script looks, hence several times."""
    for _ in range(8):
        job = sbatch(script, tmp_path, {"srun": "exec no-such-program"}, {"PATH": "/usr/bin:/bin"})
        assert "numeric argument" not in finish(job, 127)


def sbatch(script: str, tmp_path: Path, tools: dict[str, str], environment: dict[str, str] | None = None):
    """The script as it is, with these programs in front of the others, saving to tmp_path/slurm."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    for name, text in tools.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    environment = os.environ | {"SLURM_JOB_ID": "7", "OMP_NUM_THREADS": "1"} | (environment or {})
    environment["PATH"] = f"{tmp_path}/bin:{environment['PATH']}"
    command = ["bash", str(RECIPES / "slurm" / f"{script}.sbatch"), *FLAGS, "--output", str(tmp_path / "slurm")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def stop_and_requeue(start: Callable[[], subprocess.Popen], tmp_path: Path) -> Path:
    """Starts the job, stops it as Slurm does before the time limit, starts it again; its run folder."""
    folder, job = tmp_path / "slurm", start()
    wait_for_step(job, folder, 5)
    job.send_signal(signal.SIGUSR1)
    assert "stopped by a signal" in finish(job)
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    stopped_at = losses(folder)[-1][0]
    assert max(checkpoint.saved_steps(folder / "checkpoints")) == stopped_at < STEPS
    assert "resuming from" in finish(start())
    assert [step for step, _ in losses(folder)] == list(range(1, STEPS + 1))
    return folder


@pytest.fixture
def two_nodes(tmp_path):
    """Commands that run another one on node-a and on node-b: network namespaces, a veth pair between them."""
    names = [f"fastssl-{os.getpid()}-{end}" for end in "ab"]
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n10.77.0.1 node-a\n10.77.0.2 node-b\n")

    def ip(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(["ip", *words], capture_output=True, text=True)

    if shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("needs ip and unshare")
    try:
        if ip("netns", "add", names[0]).returncode:
            pytest.skip("needs the right to make network namespaces")
        made = [ip("netns", "add", names[1])]
        made += [ip("-n", names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", names[1])]
        for number, name in enumerate(names, 1):
            made += [ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "cable")]
            made += [ip("-n", name, "link", "set", link, "up") for link in ("lo", "cable")]
        if any(done.returncode for done in made):
            pytest.skip(f"needs network namespaces: {' '.join(done.stderr.strip() for done in made)}")
        inside = f'mount --bind {hosts} /etc/hosts; hostname $0; exec "$@"'
        yield tuple(
            f"ip netns exec {name} unshare --uts --mount sh -c '{inside}' node-{end}" for name, end in zip(names, "ab")
        )
    finally:
        for name in names:
            ip("netns", "delete", name)
