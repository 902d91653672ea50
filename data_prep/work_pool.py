"""Processes that work on images and may die: a death costs the image that caused it, never the run.

A decoder that crashes takes its process with it, and the kernel ends processes when memory runs out. The pool then
starts new processes and goes through the work they lost image by image, so that the one at fault is found.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from typing import Generic, Literal, NamedTuple, TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")
_BROKEN = (BrokenProcessPool, EOFError, ConnectionError)  # a worker died, or the server that starts them
_MOST_DEATHS = 8  # items in a row, after which the machine, not an image, is at fault


@dataclass(frozen=True)
class Work:
    """Who does the work, and what happens when an image cannot be used."""

    workers: int | None = None
    """Processes; by default one for each core."""
    on_error: Literal["quarantine", "stop"] = "quarantine"
    """An image that cannot be used is left out and listed with the reason, or ends the conversion."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"--workers must be at least 1, got {self.workers}")

    @property
    def processes(self) -> int:
        """The number of workers, chosen or counted."""
        return self.workers or usable_cores()


class Died(NamedTuple):
    """What an item got instead of a result: the process that worked on it alone died."""


class Ticket(NamedTuple):
    """Work that was handed out."""

    items: Sequence
    future: Future | None


class WorkPool(Generic[Item, Result]):
    """Applies a function to lists of items in processes. Used from one thread."""

    def __init__(self, function: Callable[[Item], Result], workers: int) -> None:
        self._work, self._workers = partial(_work_on, function), workers
        self._pool: ProcessPoolExecutor | None = None
        self._lone: ProcessPoolExecutor | None = None  # of one process, after a death
        self._deaths = 0

    def submit(self, items: Sequence[Item]) -> Ticket:
        """Begins to work on some items."""
        for _ in range(2 if items else 0):
            self._pool = self._pool or make_pool(self._workers)
            try:
                with _signals_later():
                    return Ticket(items, self._pool.submit(self._work, items))
            except _BROKEN:  # one has died since; those it was handed to will notice too
                self._pool = _end(self._pool)
        return Ticket(items, None)

    def results(self, ticket: Ticket) -> list[Result | Died]:
        """The results of a ticket, in the order of its items; Died for an item that kills its process.

        What the function raises is raised here. Raises ValueError when every process dies.
        """
        if ticket.future is not None:
            with contextlib.suppress(*_BROKEN):
                return ticket.future.result()
        return [self._alone(item) for item in ticket.items]

    def close(self) -> None:
        """Ends the processes once they have done what they work on."""
        self._pool, self._lone = _end(self._pool), _end(self._lone)

    def _alone(self, item: Item) -> Result | Died:
        """One item in a process of its own, so that nothing else can be what kills it; where it dies, in another one.

        The kernel ends a process where memory is short, whatever it works on.
        """
        for _ in range(2):
            self._lone = self._lone or make_pool(1)
            try:
                with _signals_later():
                    future = self._lone.submit(self._work, [item])
                (result,) = future.result()
                self._deaths = 0
                return result
            except _BROKEN:
                self._lone = _end(self._lone)
        self._deaths += 1
        if self._deaths >= _MOST_DEATHS:
            raise ValueError(
                f"every process died on {_MOST_DEATHS} images in a row, the last {getattr(item, 'name', item)}: "
                "is there enough memory? --workers 1 needs least"
            )
        return Died()


def make_pool(workers: int) -> ProcessPoolExecutor:
    """Processes that end with this one, whatever ends it. Started from a small server: it has no threads to break.

    Ctrl-C is this process's to answer: the others have it blocked from before their first instruction.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastssl.data_prep.prepare", "torch"])
    resource_tracker.ensure_running()  # before: it ends by letting Ctrl-C through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)


def ahead(begun: Iterator[Item], depth: int) -> Iterator[Item]:
    """The same items, each given once `depth` later ones have been begun too."""
    waiting: deque[Item] = deque()
    for item in begun:
        waiting.append(item)
        if len(waiting) > depth:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


def usable_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _end(pool: ProcessPoolExecutor | None) -> None:
    if pool is not None:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _signals_later() -> Iterator[None]:
    """Ctrl-C and SIGTERM take effect when the block ends: a process whose parent leaves while it starts complains."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    came: list[int] = []
    handlers = {n: signal.signal(n, lambda n, _: came.append(n)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def _work_on(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    return [function(item) for item in items]


def _start_worker() -> None:
    """What a library says of a damaged file is in the reason; orphans end."""
    import torch  # here: this process's parent may do without

    torch.set_num_threads(1)  # the processes share the cores
    warnings.simplefilter("ignore")
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
