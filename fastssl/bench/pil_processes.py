"""Runs a per-image pipeline in several processes, as a DataLoader's workers do, for comparison with our threads."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

import torch
from PIL import Image

from fastssl.bench.timing import Function


def in_processes(images: Sequence[Image.Image], chain: Callable, processes: int) -> Function:
    """A call that makes two views of every image with `chain`, in processes that already hold their share of them.

    The views are neither stacked nor sent back, which a DataLoader would also have to do. The call raises ValueError
    when a process has ended.
    """
    context = multiprocessing.get_context("spawn")
    pipes = []
    for k in range(processes):
        ours, theirs = context.Pipe()
        context.Process(target=_work, args=(theirs, images[k::processes], chain), daemon=True).start()
        pipes.append(ours)

    def call() -> None:
        try:
            for pipe in pipes:
                pipe.send(True)
            for pipe in pipes:
                pipe.recv()
        except (EOFError, OSError):
            reason = "by a signal, such as where memory is full, or by the error above"
            raise ValueError(f"a process with torchvision's views has ended, {reason}: try fewer --threads") from None

    return call


def _work(pipe: Connection, images: Sequence[Image.Image], chain: Callable) -> None:
    torch.set_num_threads(1)
    try:
        while pipe.recv():
            for image in images:
                chain(image)
                chain(image)
            pipe.send(True)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):  # the parent has ended, or is about to
        return
