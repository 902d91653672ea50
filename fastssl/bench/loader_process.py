"""Runs one loader in a process of its own and measures it from outside: CPU time, wall time, memory.

In its own process, because FFCV changes the number of threads of torch and numba, because DataLoader forks, which is
unsafe in a process with threads, and because memory and CPU time then belong to that loader alone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from typing import NamedTuple

from fastssl.bench.loader_peers import CONTESTANTS, Options

_POLL = 0.01  # seconds between two looks at the CPU clocks, which tick as often
_IDLE = 0.15  # seconds without a tick after which the process counts as idle


class Round(NamedTuple):
    """One epoch of one loader."""

    pairs: int
    seconds: float  # until the process is idle again, so that reading ahead for the next epoch counts
    cpu_seconds: float  # user and system, workers included


class LoaderProcess:
    """A loader in a child process. Every method waits for its answer, and raises ValueError when the child fails."""

    def __init__(self, name: str, options: Options) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.name = name
        self._process = context.Process(target=_serve, args=(theirs, name, options))
        self._process.start()
        theirs.close()

    def wait_for_import(self) -> None:
        """Waits until the library is imported."""
        self._receive()

    def start(self) -> float:
        """Builds the loader and runs an epoch to warm up. Returns the seconds until its first batch."""
        return self._ask("start")

    def round(self) -> Round:
        """Runs and measures an epoch."""
        return self._ask("round")

    def memory(self) -> int:
        """Bytes of private memory that the process and the loader's workers use beyond those before it was built."""
        return self._ask("memory")

    def end(self) -> None:
        """Ends the process, by force if a library's threads keep it alive."""
        with contextlib.suppress(OSError):
            self._pipe.send("end")
        self._process.join(10)
        self._process.kill()

    def _ask(self, what: str) -> object:
        with contextlib.suppress(OSError):  # it has died, as `_receive` finds out
            self._pipe.send(what)
        return self._receive()

    def _receive(self) -> object:
        try:
            failed, answer = self._pipe.recv()
        except (EOFError, OSError):
            failed, answer = True, "its process died"
        if failed:
            raise ValueError(f"{self.name}: {answer}")
        return answer


def _serve(pipe: Connection, name: str, options: Options) -> None:
    """The child process: imports the library, then answers "start", "round" and "memory" until "end"."""
    try:
        build = CONTESTANTS[name](options)
        pipe.send((False, None))
        before = own_bytes()
        while (asked := pipe.recv()) != "end":
            if asked == "start":
                began = time.perf_counter()
                epoch = build()
                batches = iter(epoch())
                next(batches)
                answer = time.perf_counter() - began
                for _ in batches:
                    pass
                wait_until_idle()
            elif asked == "memory":
                answer = own_bytes() - before
            else:
                answer = run_round(epoch)
            pipe.send((False, answer))
    except EOFError:
        pass
    except BaseException as error:  # other libraries may raise anything
        pipe.send((True, str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"))


def run_round(epoch) -> Round:
    """Runs an epoch, from an idle process until it is idle again."""
    cpu, start = cpu_seconds(), time.perf_counter()
    pairs = sum(epoch())
    end = wait_until_idle()
    return Round(pairs, end - start, cpu_seconds() - cpu)


def wait_until_idle() -> float:
    """Waits until this process and its workers are idle. Returns when they became so, by time.perf_counter."""
    moved, clock = time.perf_counter(), cpu_seconds()
    while time.perf_counter() - moved < _IDLE:
        time.sleep(_POLL)
        now = cpu_seconds()
        if now - clock > 0.3 * _POLL:  # looking at the clocks takes a little time itself
            moved = time.perf_counter()
        clock = now
    return moved


def cpu_seconds() -> float:
    """User and system time of this process and of its workers, running or ended."""
    times = os.times()
    ticks = 0
    for worker in multiprocessing.active_children():
        with contextlib.suppress(OSError), open(f"/proc/{worker.pid}/stat") as file:
            ticks += sum(map(int, file.read().rpartition(")")[2].split()[11:13]))
    return time.process_time() + times.children_user + times.children_system + ticks / os.sysconf("SC_CLK_TCK")


def own_bytes() -> int:
    """Memory of this process and its workers without mapped files, shared pages counted once (Linux)."""
    total = 0
    for pid in (os.getpid(), *(worker.pid for worker in multiprocessing.active_children())):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps_rollup") as file:
            total += sum(int(line.split()[1]) for line in file if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return total * 1024
