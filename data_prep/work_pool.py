"""A pool of processes that survives their deaths: only the image that kills its process is lost.

A decoder may crash its process, and the kernel kills processes when memory runs out. The pool then starts new processes
and repeats the lost work image by image, to find the one at fault.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeVar

from fastssl.data_prep.worker import Worker, WorkerDied
from fastssl.machine.limits import usable_cores

Item, Result = TypeVar("Item"), TypeVar("Result")
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
    """Items that were submitted, and their future results; None without items."""

    items: Sequence
    future: Future | None


class WorkPool(Generic[Item, Result]):
    """Applies a function to lists of items in processes. To be used from one thread only."""

    def __init__(self, function: Callable[[Item], Result], workers: int) -> None:
        self._function = function
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="fastssl-work")  # each waits for a process
        self._idle: deque[Worker] = deque()
        self._deaths = 0  # in a row

    def submit(self, items: Sequence[Item]) -> Ticket:
        """Starts the work on some items."""
        with _signals_later():
            return Ticket(items, self._threads.submit(self._apply, items) if items else None)

    def results(self, ticket: Ticket) -> list[Result | Died]:
        """The results of a ticket in the order of its items, with Died for an item that kills its process.

        Raises what the function raises, and ValueError when every process dies.
        """
        if ticket.future is None:
            return []
        try:
            return ticket.future.result()
        except WorkerDied:
            return [self._alone(item) for item in ticket.items]

    def close(self) -> None:
        """Ends the processes after their current work."""
        self._threads.shutdown(cancel_futures=True)
        for worker in self._idle:
            worker.end()
        self._idle.clear()

    def _apply(self, items: Sequence[Item]) -> list[Result]:
        """Has an idle process do the work, or a new one: there are as many of them as threads."""
        try:
            worker = self._idle.pop()
        except IndexError:
            worker = Worker(self._function)
        try:
            return worker.apply(items)
        finally:
            if worker.alive:
                self._idle.append(worker)

    def _alone(self, item: Item) -> Result | Died:
        """The result of one item by itself, so that no other item can kill its process.

        It gets two tries, because the kernel may also kill a process for want of memory.
        """
        for _ in range(2):
            with contextlib.suppress(WorkerDied):
                (result,) = self.submit([item]).future.result()
                self._deaths = 0
                return result
        self._deaths += 1
        if self._deaths >= _MOST_DEATHS:
            raise ValueError(
                f"processes died on {_MOST_DEATHS} images in a row, the last of them {getattr(item, 'name', item)}: "
                "memory may be short, so try --workers 1"
            )
        return Died()


def ahead(begun: Iterator[Item], depth: int) -> Iterator[Item]:
    """The items of `begun`, each yielded after the `depth` items behind it have been taken too."""
    waiting: deque[Item] = deque()
    for item in begun:
        waiting.append(item)
        if len(waiting) > depth:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


@contextlib.contextmanager
def _signals_later() -> Iterator[None]:
    """Delays Ctrl-C and SIGTERM to the end of the block: `close` would not wait for a thread that is half started."""
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
