"""Batches made ahead on a background thread and copied to the device, in order, with nothing left behind.

On a CPU they are made when they are asked for, by all threads of the loader: decoding beside a step that wants the same
cores takes more from it than decoding before it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import torch

from fastssl.batch import ImageBatch

CLOSED = "the loader was closed, or its thread died, while its batches were read"
_PATIENCE = 1.0  # seconds between looks at whether the producer is still alive


class Prefetcher:
    """Hands out iterators that run ahead of their reader, and can end them all.

    device: where the batches go. read_ahead: how many batches a loader decodes beyond the one that is asked for, None
    for 2 on a GPU and 0 on a CPU, where 0 means no background thread. depth: finished batches that may wait besides;
    the bound on memory.
    """

    def __init__(self, device: torch.device | str, read_ahead: int | None = None, depth: int = 1) -> None:
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:  # "current" is another device on another thread
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.read_ahead = (0 if self.device.type == "cpu" else 2) if read_ahead is None else read_ahead
        self.depth = depth
        self._in_turn: set[Iterator[ImageBatch]] = set()  # sources that are iterated without a thread
        self._running: dict[threading.Thread, threading.Event] = {}

    def iterate(self, source: Iterator[ImageBatch]) -> Iterator[ImageBatch]:
        """The batches of `source` (on the CPU or the device), in its order, on the device; raises what it raises.

        `source` is iterated, and closed, on a thread that ends with this generator: exhausted, closed or dropped; or,
        with nothing read ahead, where its reader is.
        """
        return self._iterate_ahead(source) if self.read_ahead else self._iterate_in_turn(source)

    def _iterate_in_turn(self, source: Iterator[ImageBatch]) -> Iterator[ImageBatch]:
        self._in_turn.add(source)
        try:
            for batch in source:
                yield batch.to(self.device)
            if source not in self._in_turn:
                raise RuntimeError(CLOSED)
        finally:
            self._in_turn.discard(source)
            source.close()

    def _iterate_ahead(self, source: Iterator[ImageBatch]) -> Iterator[ImageBatch]:
        ready: queue.Queue = queue.Queue(self.depth)
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
        """Ends every iterator handed out; their readers get an error, not silence."""
        while self._in_turn:
            self._in_turn.pop().close()
        for thread, stop in list(self._running.items()):
            self._end(thread, stop)

    def _end(self, thread: threading.Thread, stop: threading.Event) -> None:
        stop.set()
        if thread is not threading.current_thread():  # the garbage collector may run this on any thread
            thread.join()
        self._running.pop(thread, None)

    def _produce(self, source: Iterator[ImageBatch], ready: queue.Queue, stop: threading.Event) -> None:
        """The background thread: puts (batch, copied) pairs, then None, or the exception that ended it."""
        try:
            stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
            with torch.cuda.stream(stream):  # no-op without one; a source that works on the GPU does it there too
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
        """Starts the copy to the GPU on a stream of its own, so that it overlaps the step that is running.

        Pinned memory comes from torch's caching allocator, which reuses a buffer only when its copies are done.
        """
        if stream is None:
            return batch.to(self.device), None
        pinned = batch.apply(lambda tensor: tensor if tensor.is_cuda else tensor.pin_memory())
        return pinned.to(self.device, non_blocking=True), stream.record_event()

    def _receive(self, batch: ImageBatch, copied: torch.cuda.Event | None) -> ImageBatch:
        """Makes the reader's stream wait for the copy (the host does not), and keeps the memory until it has run."""
        if copied is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(copied)
            for tensor in batch[:-1]:
                tensor.record_stream(stream)
        return batch


def _put(ready: queue.Queue, item: object, stop: threading.Event) -> bool:
    """Waits for room; False when told to stop."""
    while not stop.is_set():
        try:
            ready.put(item, timeout=0.05)
            return True
        except queue.Full:
            pass
    return False
