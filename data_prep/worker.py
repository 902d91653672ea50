"""A process that applies a function to lists of items, at the end of a pipe that no other process shares.

Its death closes the pipe, even in the middle of an answer; a queue that processes share would stand still then.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

_NO_SERVER = (EOFError, ConnectionError)  # what starting a process raises when the server that starts them has died
_LOST = (EOFError, OSError)  # what a pipe raises when the process at its other end has died, before or in an answer
_UNTIL_GONE_S = (0, 0.01, 0.1, 1)  # pauses, to let a dead server go: its files close before its parent is told


class WorkerDied(Exception):
    """The process died at its work, or could not be started."""


class Worker:
    """A child process. Only its parent handles Ctrl-C and SIGTERM: they are blocked in the child from its start.

    Raises WorkerDied if no process can be started, and OSError when the system has no room for one.
    """

    def __init__(self, function: Callable) -> None:
        for pause in _UNTIL_GONE_S:
            time.sleep(pause)
            with contextlib.suppress(*_NO_SERVER):
                self._process, self._pipe = _start(function)
                return
        raise WorkerDied("no process can be started")

    def apply(self, items: Sequence) -> list:
        """The function's results for the items, in their order. Raises what it raises, and WorkerDied."""
        try:
            self._pipe.send(items)
            results, error, told = self._pipe.recv()
        except _LOST:
            self.end()
            raise WorkerDied(f"the process {self._process.pid} died at its work") from None
        if error is not None:
            raise error from RuntimeError(f"in the process {self._process.pid}:\n{told}")
        return results

    @property
    def alive(self) -> bool:
        """Whether the process can take work."""
        return not self._pipe.closed

    def end(self) -> None:
        """Ends the process, which has no work, and waits for it."""
        self._pipe.close()
        self._process.join()


def _start(function: Callable) -> tuple[BaseProcess, Connection]:
    """Starts a process for a function, or a partial. A fork server does it: forking beside threads is unsafe."""
    context = multiprocessing.get_context("forkserver")
    # what the function needs is imported once, and not by every process
    context.set_forkserver_preload(["torch", getattr(function, "func", function).__module__])
    resource_tracker.ensure_running()  # before signals are blocked, because it unblocks them at its end
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        forkserver.ensure_running()
        ours, theirs = context.Pipe()
        with theirs:
            process = context.Process(target=_serve, args=(theirs, function))
            try:
                process.start()
            except BaseException:
                ours.close()
                raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return process, ours


def _serve(pipe: Connection, function: Callable) -> None:
    """The process: one thread for the work, and one that ends it at once when its parent has died."""
    import torch  # only these processes need it

    torch.set_num_threads(1)  # the processes share the cores
    warnings.simplefilter("ignore")  # what is wrong with a file is in its BadImage
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    with contextlib.suppress(*_LOST):  # its parent has ended, or has no more work
        while True:
            items = pipe.recv()
            try:
                answer = [function(item) for item in items], None, ""
            except Exception as error:
                answer = None, error, traceback.format_exc()
            pipe.send(answer)
