"""The next batch arrives and becomes views while the GPU still trains on the last one: on a stream of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastssl.batch import ImageBatch

IDLE, FEWEST = 0.9, 50  # of so many looks at a GPU, the share that finds it idle where the host cannot keep up
STARVES = (
    "the GPU waits for the host, which launches kernels more slowly than the GPU runs them: a larger --batch-size, "
    "fewer other processes or, unless the encoders run so already, --compile graphs may make training faster"
)
AHEAD = 3  # steps whose end the host has not seen: the GPU does not run dry, and memory stays bounded


class InputStream:
    """A CUDA stream for what comes before the encoders. On a CPU it does nothing: all runs in turn.

    The host is ahead of the GPU, so what it puts on this stream for step i + 1 waits for its batch alone, not for
    step i. Only the training stream waits, for the views. The host is AHEAD steps ahead at most, for every step it has
    prepared holds a batch and its views.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.looks, self.idle, self.told = 0, 0, False  # when the host is done with a step, the GPU should not be

    def draw(self, batches: Iterator[ImageBatch]) -> Iterator[ImageBatch]:
        """The same batches, ready on this stream (and not on the current one)."""
        if self.stream is None:
            yield from batches
            return
        training = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(training)  # which may have loaded the images
        ends: deque[torch.cuda.Event] = deque()
        while True:
            if len(ends) == AHEAD:
                ends.popleft().synchronize()
            with torch.cuda.stream(self.stream):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch
            self.looks, self.idle = self.looks + 1, self.idle + training.query()
            ends.append(training.record_event(torch.cuda.Event(blocking=True)))  # a core sleeps while it waits

    def news(self) -> list[str]:
        """What to tell a person, once: that the GPU was idle when the host had launched a step, most of the time."""
        if self.told or self.looks < FEWEST or self.idle <= IDLE * self.looks:
            return []
        self.told = True
        return [STARVES]

    def run(self, make_views: Callable[..., tuple[Tensor, Tensor]], *args: object) -> tuple[Tensor, Tensor]:
        """`make_views(*args)` of a batch that was drawn here: made on this stream, ready on the current one."""
        if self.stream is None:
            return make_views(*args)
        training = torch.cuda.current_stream(self.stream.device)
        with torch.cuda.stream(self.stream):
            views = make_views(*args)
        training.wait_stream(self.stream)
        for view in views:
            view.record_stream(training)  # their memory is not used again before training has read them
        return views


IN_TURN = InputStream(torch.device("cpu"))  # for batches that are ready on the current stream, on any device
