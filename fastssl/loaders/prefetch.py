"""Makes batches ahead on a background thread and copies them to the device, in order, leaving no threads behind.

When training on a CPU, batches are made on demand instead: decoding during a step would slow it down by more than
decoding before it takes, since both need all cores.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator
from contextlib import nullcontext

import torch

from fastssl.batch import ImageBatch
from fastssl.machine.limits import usable_cores

CLOSED = "the loader was closed, or its thread died, while its batches were being read"
FORKED = "these batches were begun before this process was forked: begin new ones here, with the loader's batches()"
_PATIENCE = 1.0  # seconds between checks whether the producer is still alive


def count_workers(asked: int | None) -> int:
    """Decoding threads: as asked (0, as of a DataLoader: one), by default this process's share of the cores.

    That is those it may use, divided by the number of ranks on the machine.
    """
    if asked is not None:
        return max(1, asked)
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class Prefetcher:
    """Gives out iterators that run ahead of their reader, and can end all of them.

    device: where the batches go. read_ahead: how many batches a loader decodes beyond the one requested; None means 2
    on a GPU and 0 on a CPU; with 0 there is no background thread. One finished batch may wait in addition.
    """

    def __init__(self, device: torch.device | str, read_ahead: int | None = None) -> None:
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:  # each thread has its own current device
            self.device = torch.device("cuda", torch.cuda.current_device())
        if read_ahead is None:
            read_ahead = 0 if self.device.type == "cpu" else 2
        self.read_ahead = read_ahead
        self._in_turn: set[Iterator[ImageBatch]] = set()  # sources iterated without a thread
        self._running: dict[threading.Thread, threading.Event] = {}

    def iterate(self, source: Iterator[ImageBatch]) -> Iterator[ImageBatch]:
        """The batches of `source` (on the CPU or the device), in order, on the device; raises what `source` raises.

        With read_ahead a thread iterates `source`; it ends, and `source` is closed, when this generator is exhausted,
        closed or dropped. Without, the reader's own thread iterates it.
        """
        return self._iterate_ahead(source) if self.read_ahead else self._iterate_in_turn(source)

    def _iterate_in_turn(self, source: Iterator[ImageBatch]) -> Iterator[ImageBatch]:
        self._in_turn.add(source)
        process = os.getpid()
        try:
            for batch in source:
                yield batch.to(self.device)
                if os.getpid() != process:  # the threads that decode did not come along
                    raise RuntimeError(FORKED)
            if source not in self._in_turn:
                raise RuntimeError(CLOSED)
        finally:
            if os.getpid() == process:  # DALI crashes when it is taken down in a forked process
                self._in_turn.discard(source)
                source.close()

    def _iterate_ahead(self, source: Iterator[ImageBatch]) -> Iterator[ImageBatch]:
        ready: queue.Queue = queue.Queue(1)
        stop = threading.Event()
        thread = threading.Thread(target=self._produce, args=(source, ready, stop), name="fastssl-load", daemon=True)
        self._running[thread] = stop
        thread.start()
        try:
            while (item := self._take(ready, thread)) is not None:
                yield self._receive(*item)
        finally:
            self._end(thread, stop)

    def close(self) -> None:
        """Ends all iterators; their readers get a RuntimeError."""
        while self._in_turn:
            self._in_turn.pop().close()
        for thread, stop in list(self._running.items()):
            self._end(thread, stop)

    def _end(self, thread: threading.Thread, stop: threading.Event) -> None:
        stop.set()
        if thread is not threading.current_thread():  # garbage collection may run this on any thread
            thread.join()
        self._running.pop(thread, None)

    def _produce(self, source: Iterator[ImageBatch], ready: queue.Queue, stop: threading.Event) -> None:
        """The background thread: puts (batch, copy event) pairs, then None or the exception that ended it."""
        try:
            stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
            # also for a source that works on the GPU; on a CPU torch.cuda.stream(None) would start CUDA if it could
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                for batch in source:
                    if not _put(ready, self._send(batch, stream), stop):
                        break
            _put(ready, None, stop)
        except BaseException as error:
            _put(ready, error, stop)
        finally:
            source.close()

    def _take(self, ready: queue.Queue, thread: threading.Thread) -> tuple | None:
        while True:
            try:
                item = ready.get(timeout=_PATIENCE)
            except queue.Empty:
                if not thread.is_alive() and ready.empty():
                    raise RuntimeError(CLOSED) from None
                continue
            if isinstance(item, BaseException):
                raise item
            return item

    def _send(self, batch: ImageBatch, stream: torch.cuda.Stream | None) -> tuple:
        """Starts the copy to the GPU on `stream`, so that it overlaps with the running step.

        Pinned memory comes from torch's caching allocator, which reuses a buffer only after its copies are done.
        """
        if stream is None:
            return batch.to(self.device), None
        pinned = batch.apply(lambda tensor: tensor if tensor.is_cuda else tensor.pin_memory())
        return pinned.to(self.device, non_blocking=True), stream.record_event()

    def _receive(self, batch: ImageBatch, copied: torch.cuda.Event | None) -> ImageBatch:
        """Makes the reader's stream, not the host, wait for the copy, and keeps the memory until it is done."""
        if copied is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(copied)
            for tensor in batch[:-1]:
                tensor.record_stream(stream)
        return batch


def _put(ready: queue.Queue, item: object, stop: threading.Event) -> bool:
    """Puts `item` into the queue when there is room; returns False if told to stop."""
    while not stop.is_set():
        try:
            ready.put(item, timeout=0.05)
            return True
        except queue.Full:
            pass
    return False
