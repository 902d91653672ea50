"""Prepares the views of the next batch on a CUDA stream of its own, while the GPU still trains on the current one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastssl.batch import ImageBatch

IDLE_SHARE, FEWEST_LOOKS = 0.9, 50  # the GPU waits for the host if this share of at least so many looks finds it idle
GPU_WAITS = (
    "the GPU waits for the host, which launches kernels more slowly than the GPU runs them: a larger --batch-size, "
    "fewer other processes or --compile graphs (if not on already) may make training faster"
)
AHEAD = 3  # steps by which the host may be ahead: enough to keep the GPU busy, few enough to bound the memory


class InputStream:
    """A CUDA stream for everything before the encoders. On a CPU everything simply runs in turn.

    The work of step i + 1 on this stream waits only for its batch, not for step i; the training stream waits only for
    the views. The host stays at most AHEAD steps ahead, because every step it has prepared holds a batch and its views.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # Each time the host has launched a step it looks whether the GPU has already finished all its work.
        self.looks, self.idle, self.told = 0, 0, False

    def draw(self, batches: Iterator[ImageBatch]) -> Iterator[ImageBatch]:
        """The same batches, ready on this stream but not yet on the current one."""
        if self.stream is None:
            yield from batches
            return
        training = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(training)  # the images may have been loaded on it
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
            ends.append(training.record_event(torch.cuda.Event(blocking=True)))  # waiting for it lets the core sleep

    def news(self) -> list[str]:
        """A line for the log, once, if the GPU was idle almost every time the host had launched a step."""
        if self.told or self.looks < FEWEST_LOOKS or self.idle <= IDLE_SHARE * self.looks:
            return []
        self.told = True
        return [GPU_WAITS]

    def run(self, make_views: Callable[..., tuple[Tensor, Tensor]], *args: object) -> tuple[Tensor, Tensor]:
        """`make_views(*args)` for a batch that `draw` gave: computed on this stream, ready on the current one."""
        if self.stream is None:
            return make_views(*args)
        training = torch.cuda.current_stream(self.stream.device)
        with torch.cuda.stream(self.stream):
            views = make_views(*args)
        training.wait_stream(self.stream)
        for view in views:
            view.record_stream(training)  # keeps their memory until training has read them
        return views


IN_TURN = InputStream(torch.device("cpu"))  # for batches that are ready on the current stream, on any device
