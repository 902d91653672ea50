"""Who waits for whom on a GPU, without one: streams that notice a read before what is read is there.

Each stream knows how far it has seen every stream get; a wait carries that knowledge over. What a stream makes is
stamped with its time, and whoever reads it must have seen that time.
"""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from typing import ClassVar

import pytest
import torch

from fastssl.batch import ImageBatch
from fastssl.input_stream import AHEAD, FEWEST_LOOKS, GPU_WAITS, InputStream
from fastssl.loaders.prefetch import Prefetcher

CUDA = torch.device("cuda", 0)


class Stream:
    """In place of torch.cuda.Stream."""

    def __init__(self, device: object = None) -> None:
        self.device, self.seen = device, defaultdict(int)

    idle = False

    def query(self) -> bool:
        return Stream.idle

    def work(self) -> tuple[Stream, int]:
        """Does something; what and when."""
        self.seen[self] += 1
        return self, self.seen[self]

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.seen = dict(self.seen)
        return event

    def wait_event(self, event: Event) -> None:
        for stream, time in event.seen.items():
            self.seen[stream] = max(self.seen[stream], time)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())


class Event:
    """In place of torch.cuda.Event."""

    waited_for: ClassVar[list[dict[Stream, int]]] = []

    def __init__(self, blocking: bool = False) -> None:
        self.seen: dict[Stream, int] = {}

    def synchronize(self) -> None:
        Event.waited_for.append(self.seen)


class Data:
    """A tensor of which only its place in time matters; on the device once `made` is by a stream of `gpu`'s."""

    def __init__(self, made: tuple[Stream, int] | None = None) -> None:
        self.made, self.kept_for, self.is_cuda, self.pinned = made, set(), made is not None, False

    def pin_memory(self) -> Data:
        copy = Data()
        copy.pinned = True
        return copy

    def to(self, device: object, non_blocking: bool) -> Data:
        assert self.is_cuda or (self.pinned and non_blocking), "the host would wait for the copy"
        return self if self.is_cuda else Data(torch.cuda.current_stream().work())

    def record_stream(self, stream: Stream) -> None:
        self.kept_for.add(stream)

    def read(self) -> None:
        """By the current stream: it must have waited, and the memory must be kept for it."""
        stream, (maker, time) = torch.cuda.current_stream(), self.made
        assert stream.seen[maker] >= time, "read before it is there"
        assert stream is maker or stream in self.kept_for, "its memory may be used again too early"


@pytest.fixture
def main_stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """The stream that is current where nothing else is said, as torch has it: for each thread."""
    main, current = Stream(CUDA), threading.local()

    @contextlib.contextmanager
    def use(stream: Stream | None):
        before = getattr(current, "stream", main)
        current.stream = stream or before
        try:
            yield
        finally:
            current.stream = before

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: getattr(current, "stream", main))
    monkeypatch.setattr(Event, "waited_for", [])
    return main


def make_views(batch: ImageBatch) -> tuple[Data, Data]:
    for data in batch[:-1]:
        data.read()
    return tuple(Data(torch.cuda.current_stream().work()) for _ in range(2))


def images_of(make):
    """Batches without end."""
    while True:
        yield ImageBatch(*(make() for _ in range(6)), 1)


def on_device() -> Data:
    return Data(torch.cuda.current_stream().work())


@pytest.mark.parametrize("prefetched", [False, True])
def test_views_and_batches_are_there_when_they_are_read(main_stream: Stream, prefetched: bool) -> None:
    """Batches prefetched from the host by a stream of their own, and windows into what the main stream loaded."""
    inputs, loader = InputStream(CUDA), Prefetcher(CUDA)
    loaded = on_device()
    batches = loader.iterate(images_of(Data)) if prefetched else images_of(on_device)
    for step, batch in enumerate(inputs.draw(batches)):
        if step == 0:
            with torch.cuda.stream(inputs.stream):
                loaded.kept_for.add(inputs.stream)
                loaded.read()
        for view in inputs.run(make_views, batch):
            view.read()
        main_stream.work()
        if step == 9:
            break
    loader.close()


def test_the_host_is_a_few_steps_ahead_and_views_do_not_wait_for_training(main_stream: Stream) -> None:
    inputs, ends = InputStream(CUDA), []
    for step, batch in enumerate(inputs.draw(images_of(on_device))):
        inputs.run(make_views, batch)
        assert inputs.stream.seen[main_stream] == 0  # of the training it has waited for nothing
        ends.append(main_stream.work()[1])
        waited = [seen[main_stream] for seen in Event.waited_for]
        assert waited == ends[: max(0, step + 1 - AHEAD)]
        if step == 9:
            break


@pytest.mark.parametrize("idle, said", [(1.0, [GPU_WAITS]), (0.5, [])])
def test_a_gpu_that_waits_for_the_host_is_reported_once(main_stream, monkeypatch, idle, said) -> None:
    inputs, told = InputStream(CUDA), []
    for step, _ in zip(range(3 * FEWEST_LOOKS), inputs.draw(images_of(on_device))):
        monkeypatch.setattr(Stream, "idle", step % 2 < 2 * idle)
        told += inputs.news()
        assert told == [] or step >= FEWEST_LOOKS
    assert told == said


@pytest.mark.parametrize("method", ["wait_stream", "wait_event"])
def test_a_missing_wait_is_noticed(main_stream: Stream, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setattr(Stream, method, lambda self, other: None)
    inputs, loader = InputStream(CUDA), Prefetcher(CUDA)
    batch = next(inputs.draw(loader.iterate(images_of(Data))))
    with pytest.raises(AssertionError, match="read before it is there"):
        for view in inputs.run(make_views, batch):
            view.read()
    loader.close()


def test_memory_that_is_not_kept_is_noticed(main_stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Data, "record_stream", lambda self, stream: None)
    inputs = InputStream(CUDA)
    batch = next(inputs.draw(images_of(on_device)))
    with pytest.raises(AssertionError, match="used again too early"):
        inputs.run(make_views, batch)[0].read()
