"""A pool of processes that survives their deaths: only the image that kills its process is lost.

A decoder may crash its process, and the kernel kills processes when memory runs out. The pool then starts new processes
and repeats the lost work image by image, to find the one at fault.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
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

from fastssl.machine.limits import usable_cores

Item, Result = TypeVar("Item"), TypeVar("Result")
_BROKEN = (BrokenProcessPool, EOFError, ConnectionError)  # a worker died, or the server that starts workers
_UNTIL_GONE_S = (0, 0.01, 0.1, 1)  # pauses, to let a dead server go: its files close before its parent is told
_MOST_DEATHS = 8  # so many items in a row that kill their process mean that the machine is at fault


@dataclass(frozen=True)
class Work:
    """How the work is done."""

    workers: int | None = None
    """Number of processes; by default one per core."""
    on_error: Literal["quarantine", "stop"] = "quarantine"
    """quarantine: leave out images that cannot be used and list them with the reason; stop: end the conversion."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"--workers must be at least 1, got {self.workers}")

    @property
    def processes(self) -> int:
        """The number of processes: `workers`, or the cores this process may use."""
        return self.workers or usable_cores()


class Died(NamedTuple):
    """Stands for the result of an item that killed its process, twice."""


class Ticket(NamedTuple):
    """Items that were submitted, and their future results; None if no process could take them."""

    items: Sequence
    future: Future | None


class WorkPool(Generic[Item, Result]):
    """Applies a function to lists of items in processes. To be used from one thread only."""

    def __init__(self, function: Callable[[Item], Result], workers: int) -> None:
        self._work, self._workers = partial(_work_on, function), workers
        self._pool: ProcessPoolExecutor | None = None
        self._lone: ProcessPoolExecutor | None = None  # a single process, to repeat work after a death
        self._deaths = 0  # in a row

    def submit(self, items: Sequence[Item]) -> Ticket:
        """Starts the work on some items."""
        if not items:
            return Ticket(items, None)
        for _ in range(2):
            self._pool = self._pool or make_pool(self._workers)
            try:
                with _signals_later():
                    return Ticket(items, self._pool.submit(self._work, items))
            except _BROKEN:  # a process has died; `results` of the tickets it worked on will find out
                self._pool = _end(self._pool)
        return Ticket(items, None)

    def results(self, ticket: Ticket) -> list[Result | Died]:
        """The results of a ticket in the order of its items, with Died for an item that kills its process.

        Raises what the function raises, and ValueError when every process dies.
        """
        if ticket.future is not None:
            with contextlib.suppress(*_BROKEN):
                return ticket.future.result()
        return [self._alone(item) for item in ticket.items]

    def close(self) -> None:
        """Ends the processes after their current work."""
        self._pool, self._lone = _end(self._pool), _end(self._lone)

    def _alone(self, item: Item) -> Result | Died:
        """The result of one item in a process of its own, so that no other item can kill it.

        It gets two tries, because the kernel may also kill a process for want of memory.
        """
        for _ in range(2):
            try:
                (result,) = self._start_alone(item).result()
                self._deaths = 0
                return result
            except _BROKEN:
                self._lone = _end(self._lone)
        self._deaths += 1
        if self._deaths >= _MOST_DEATHS:
            raise ValueError(
                f"processes died on {_MOST_DEATHS} images in a row, the last of them {getattr(item, 'name', item)}: "
                "memory may be short, so try --workers 1"
            )
        return Died()

    def _start_alone(self, item: Item) -> Future:
        """Hands one item to the single process. Raises BrokenProcessPool if no process can be started.

        No process has seen the item when this fails, so it counts for no try of the item's: the server that starts
        processes has died, and for a moment the system calls it alive although nobody can reach it any more.
        """
        for pause in _UNTIL_GONE_S:
            time.sleep(pause)
            self._lone = self._lone or make_pool(1)
            try:
                with _signals_later():
                    return self._lone.submit(self._work, [item])
            except _BROKEN:
                self._lone = _end(self._lone)
        raise BrokenProcessPool("no process can be started")


def make_pool(workers: int) -> ProcessPoolExecutor:
    """Processes that end when this one does. A fork server starts them: forking a process that has threads is unsafe.

    Only this process handles Ctrl-C: SIGINT is blocked in the others from their start.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastssl.data_prep.prepare", "torch"])
    resource_tracker.ensure_running()  # before SIGINT is blocked, because it unblocks SIGINT at its end
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)


def ahead(begun: Iterator[Item], depth: int) -> Iterator[Item]:
    """The items of `begun`, each yielded after the `depth` items behind it have been taken too."""
    waiting: deque[Item] = deque()
    for item in begun:
        waiting.append(item)
        if len(waiting) > depth:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


def _end(pool: ProcessPoolExecutor | None) -> None:
    if pool is not None:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _signals_later() -> Iterator[None]:
    """Delays Ctrl-C and SIGTERM to the end of the block: a process prints errors if its parent leaves at its start."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread handles signals
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
    """Sets a worker up: one thread, no warnings, and a thread that ends it when its parent has died."""
    import torch  # only workers need it

    torch.set_num_threads(1)  # the processes share the cores
    warnings.simplefilter("ignore")  # what is wrong with a file is in its BadImage
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
