"""What this process may use of the machine: cores and memory, within the limits of containers and batch systems.

Docker (--cpus, --memory), Kubernetes, Slurm and systemd set these limits on control groups. Each process is in one, and
the limits of the groups around it hold too. Version 1 of Linux's control groups has a hierarchy for each controller,
version 2 a single one.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
MEMINFO = Path("/proc/meminfo")
MEMORY_FILES = (  # of version 2 and of version 1: the limit, what is in use, and how memory.stat calls the page cache
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def usable_cores() -> int:
    """Cores this process may use: those it may run on, and no more than its share of time is worth, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, math.ceil(min(cpu_quotas(), default=cores))))


def free_memory() -> int:
    """Bytes that can be allocated without swapping, and within the process's limits."""
    facts = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    free = int(facts["MemAvailable"].split()[0]) * 1024
    most = resource.getrlimit(resource.RLIMIT_AS)[0]  # of this process (ulimit -v)
    if most != resource.RLIM_INFINITY:
        free = min(free, most - int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize())
    return max(0, min([free, *memory_left()]))


def cpu_quotas() -> Iterator[float]:
    """The limits on processor time, in cores."""
    for group in cgroups("cpu"):
        with contextlib.suppress(OSError, ValueError):  # no such file; "max" and a period without a limit
            quota, period = (group / "cpu.max").read_text().split()
            yield int(quota) / int(period)
        with contextlib.suppress(OSError, ValueError):
            quota, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            if quota > 0:  # -1 without a limit
                yield quota / period


def memory_left() -> Iterator[int]:
    """Bytes left of each limit on memory; the page cache, which is freed on demand, does not count as used."""
    for group in cgroups("memory"):
        for limit, used, cached in MEMORY_FILES:
            with contextlib.suppress(OSError, ValueError, KeyError):  # no such file; "max" without a limit
                facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                in_use = int((group / used).read_text()) - int(facts[cached])
                yield int((group / limit).read_text()) - in_use


def cgroups(controller: str) -> list[Path]:
    """The folders of the control groups in which a controller may limit this process, from the innermost outwards.

    In a container the path may be that outside it: then only the outermost folder exists, which is the container's.
    """
    found = []
    with contextlib.suppress(OSError):  # not Linux
        for line in OWN_CGROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            top = CGROUPS / controller if controllers else CGROUPS
            group = top / path.lstrip("/")
            found += [group, *group.parents][: len(group.parts) - len(top.parts) + 1]
    return found
