"""Cores and memory within the limits of control groups, in folders as Linux and Docker make them."""

import json
import os

import pytest
import torch

import bench_throughput
from fastssl import distributed
from fastssl.machine import limits

MEMORY_STAT = "anon 900\ninactive_file {cached}\ntotal_inactive_file {cached}\n"


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Writes the process's groups and the files of groups; 16 cores, 8 kB free."""
    top, own, meminfo = tmp_path / "cgroup", tmp_path / "own", tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  99 kB\nMemAvailable:  8 kB\n")
    for name, path in (("CGROUPS", top), ("OWN_CGROUPS", own), ("MEMINFO", meminfo)):
        monkeypatch.setattr(limits, name, path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))

    def write(lines, files):
        own.write_text(lines)
        for name, text in files.items():
            (top / name).parent.mkdir(parents=True, exist_ok=True)
            (top / name).write_text(text)

    return write


@pytest.mark.parametrize(
    ("lines", "files", "cores"),
    [
        ("0::/\n", {}, 16),  # a machine without limits
        ("0::/user\n", {"cpu.max": "max 100000\n", "user/cpu.max": "max 100000\n"}, 16),
        ("0::/\n", {"cpu.max": "350000 100000\n"}, 4),  # docker run --cpus 3.5; a pod of Kubernetes
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "9900000 100000\n"}, 16),  # more than there are
        ("0::/job/step\n", {"job/cpu.max": "200000 100000\n", "job/step/cpu.max": "max 100000\n"}, 2),
        ("0::/job/step\n", {"job/cpu.max": "600000 100000\n", "job/step/cpu.max": "500000 100000\n"}, 5),
        ("0::/other\n", {"job/cpu.max": "200000 100000\n"}, 16),
        (  # version 1, seen from outside and from inside the container
            "9:memory:/\n2:cpu,cpuacct:/docker/abc\n0::/\n",
            {"cpu/docker/abc/cpu.cfs_quota_us": "300000\n", "cpu/docker/abc/cpu.cfs_period_us": "100000\n"},
            3,
        ),
        ("2:cpu:/docker/abc\n", {"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ("2:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 16),
    ],
)
def test_cores(groups, lines, files, cores):
    groups(lines, files)
    assert limits.usable_cores() == cores


def test_cores_where_there_are_no_groups(groups):
    assert limits.usable_cores() == 16


@pytest.mark.parametrize(
    ("lines", "files", "free"),
    [
        ("0::/\n", {}, 8192),
        ("0::/\n", {"memory.max": "max\n", "memory.current": "1000\n"}, 8192),
        ("0::/\n", {"memory.max": "7000\n", "memory.current": "3000\n"}, 4100),
        ("0::/job/step\n", {"job/memory.max": "7000\n", "job/memory.current": "5000\n"}, 2100),  # Slurm's --mem
        ("0::/\n", {"memory.max": "7000\n", "memory.current": "7200\n"}, 0),
        (
            "4:memory:/docker/abc\n",
            {"memory/memory.limit_in_bytes": "7000\n", "memory/memory.usage_in_bytes": "3000\n"},
            4100,
        ),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": f"{2**63}\n", "memory/memory.usage_in_bytes": "9\n"}, 8192),
    ],
)
def test_memory(groups, lines, files, free):
    """100 bytes of what is in use are files that could be dropped."""
    stat = {f"{name.rpartition('/')[0]}/memory.stat".lstrip("/"): MEMORY_STAT.format(cached=100) for name in files}
    groups(lines, files | stat)
    assert limits.free_memory() == free


@pytest.fixture
def two_threads():
    """torch's threads, of which the rest of the tests uses as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("given", "threads"), [(None, 1), ("2", 2)])
def test_torch_uses_no_more_threads_than_cores(monkeypatch, two_threads, given, threads):
    """Unless it was told how many to use."""
    monkeypatch.setattr(distributed, "usable_cores", lambda: 1)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    distributed.start("cpu")
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("asked", "threads"), [([], 1), (["--threads", "2"], 2)])
def test_a_benchmark_keeps_to_the_cores_unless_it_was_told(monkeypatch, tmp_path, two_threads, asked, threads):
    monkeypatch.setattr(distributed, "usable_cores", lambda: 1)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    output = tmp_path / "loss.json"
    few = ["--num", "2", "--queue-size", "4", "--dim", "2", "--rounds", "1", "--no-compiled", "--device", "cpu"]
    assert bench_throughput.main(["loss", *few, *asked, "--output", str(output)]) == 0
    assert json.loads(output.read_text())["environment"]["threads"] == threads
