"""One loader in a process of its own, measured from outside its code: CPU time, wall time, memory.

Own processes because FFCV sets torch and numba to its own number of threads, because DataLoader forks, which no
process with running threads survives for sure, and because memory and CPU time are then nobody else's.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from typing import NamedTuple

from fastssl.bench.loader_peers import CONTESTANTS, Options

_POLL = 0.01  # seconds between looks at the CPU clocks, whose ticks are as long
_IDLE = 0.15  # seconds without a tick after which all that was begun is done


class Round(NamedTuple):
    """One epoch of one loader."""

    pairs: int
    seconds: float  # until the process was idle again: what was read ahead before is made up for after
    cpu_seconds: float  # user and system, workers included


class LoaderProcess:
    """A loader in a child process; `import_`, `start` and `round` wait for it. Raises ValueError when it fails."""

    def __init__(self, name: str, options: Options) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.name = name
        self._process = context.Process(target=_serve, args=(theirs, name, options))
        self._process.start()
        theirs.close()

    def wait_for_import(self) -> str | None:
        """None, or why this loader cannot run here."""
        return self._receive()

    def start(self) -> float:
        """Builds the loader and runs an epoch to warm up; seconds until its first batch."""
        return self._ask("start")

    def round(self) -> Round:
        """Runs an epoch."""
        return self._ask("round")

    def memory(self) -> int:
        """Bytes of memory of its own that the loader and its workers have gained since it was built."""
        return self._ask("memory")

    def end(self) -> None:
        """Ends the process, by force where a library's threads would keep it for ever."""
        with contextlib.suppress(OSError):
            self._pipe.send("end")
        self._process.join(10)
        self._process.kill()

    def _ask(self, what: str) -> object:
        self._pipe.send(what)
        return self._receive()

    def _receive(self) -> object:
        try:
            failed, answer = self._pipe.recv()
        except EOFError:
            failed, answer = True, "its process died"
        if failed:
            raise ValueError(f"{self.name}: {answer}")
        return answer


def _serve(pipe: Connection, name: str, options: Options) -> None:
    """The child: imports, then does as it is asked."""
    epoch = None
    try:
        try:
            build, reason = CONTESTANTS[name](options), None
        except (ValueError, ImportError) as error:
            build, reason = None, str(error)
        pipe.send((False, reason))
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
    except BaseException as error:
        pipe.send((True, f"{type(error).__name__}: {error}"))


def run_round(epoch) -> Round:
    """Runs an epoch from idle to idle."""
    cpu, start = cpu_seconds(), time.perf_counter()
    pairs = sum(epoch())
    end = wait_until_idle()
    return Round(pairs, end - start, cpu_seconds() - cpu)


def wait_until_idle() -> float:
    """Waits until this process and its workers stand still; when they last moved, by time.perf_counter."""
    moved, clock = time.perf_counter(), cpu_seconds()
    while time.perf_counter() - moved < _IDLE:
        time.sleep(_POLL)
        now = cpu_seconds()
        if now - clock > 0.3 * _POLL:  # looking costs a little itself
            moved = time.perf_counter()
        clock = now
    return moved


def cpu_seconds() -> float:
    """User and system time of this process and of its living and ended workers."""
    times = os.times()
    ticks = 0
    for worker in multiprocessing.active_children():
        with contextlib.suppress(OSError), open(f"/proc/{worker.pid}/stat") as file:
            ticks += sum(map(int, file.read().rpartition(")")[2].split()[11:13]))
    return time.process_time() + times.children_user + times.children_system + ticks / os.sysconf("SC_CLK_TCK")


def own_bytes() -> int:
    """Memory that is neither a file's nor shared with strangers, of this process and its workers (Linux)."""
    total = 0
    for pid in (os.getpid(), *(worker.pid for worker in multiprocessing.active_children())):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps_rollup") as file:
            total += sum(int(line.split()[1]) for line in file if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return total * 1024
