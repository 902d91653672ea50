"""Compiles every kernel exactly as the product would launch it on an H200 that is not there, and launches nothing.

Run by test_fake_cuda.py in a process of its own, without Triton's interpreter. One JSON object per launch: kernel,
types of its arguments as Triton specialises them, grid, shared memory. First the views, after an empty line the loss.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from unittest import mock

import torch
from fake_cuda import fake_cuda
from torch._library.triton import set_wrap_triton_enabled
from torch._subclasses.fake_tensor import FakeTensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction, MockTensor

from fastssl.augment.normalise import normalise_bytes
from fastssl.augment.policy import make_policy
from fastssl.augment.views import make_views
from fastssl.batch import ImageBatch
from fastssl.kernels.queue_loss import queue_loss
from fastssl.kernels.row_lse import row_lse

run = JITFunction.run


def compile_only(kernel: JITFunction, *args, grid, warmup, **options):
    """In place of a launch: the same arguments, told by their types, to Triton's own specialisation and compiler."""
    assert all(arg.is_cuda and arg.is_contiguous() for arg in args if isinstance(arg, FakeTensor))
    assert all(0 < size < 65536 for size in grid[1:]) and 0 < grid[0] < 2**31
    kinds = [MockTensor(arg.dtype) if isinstance(arg, FakeTensor) else arg for arg in args]
    compiled = run(kernel, *kinds, grid=grid, warmup=True, **options)
    types = [str(kind) for kind in compiled.src.signature.values()]
    row = {"kernel": kernel.fn.__name__, "types": types, "grid": list(grid), "shared": compiled.metadata.shared}
    print(json.dumps(row), flush=True)


def batch_on(device: torch.device, count: int, side: int) -> ImageBatch:
    index = torch.arange(count, device=device)
    sides = torch.full((count,), side, dtype=torch.int32, device=device)
    return ImageBatch(torch.zeros(9, dtype=torch.uint8, device=device), index, sides, sides, index, index, side)


def compile_views(device: torch.device) -> None:
    """Batches and views of one tile and of many; small and large keys; parameters drawn and given; view_k as bytes."""
    for count, size, seed, epoch in [(256, 224, 0, 0), (1, 32, 1, 1), (3, 96, 2**63 - 1, 2**32 - 1)]:
        for changes in ({}, {"crop_iou": (0.2, 0.5)}):
            batch, policy = batch_on(device, count, 256), make_policy("v2", **changes)
            for key_bytes in (False, True):
                _, view_k = make_views(batch, policy, size, seed, epoch, torch.bfloat16, "triton", key_bytes)
            for layout in (torch.channels_last, torch.contiguous_format):
                normalise_bytes(view_k.contiguous(memory_format=layout), torch.bfloat16, "triton")


def compile_loss(device: torch.device) -> None:
    """One query and many, queues that fill their tiles and not, with one term and with all, one part and many."""
    everything, moco = (1.0, 0.07, 3.0, 1.5, 1.0, 3.0), (1.0, 0.2, 0.0, 2.0, 0.0, 3.0)
    for num, queue_size, dtype, weights in [
        (256, 65536, torch.bfloat16, everything),
        (256, 65536, torch.bfloat16, moco),
        (1, 65535, torch.float16, everything),
        (7, 40, torch.float32, everything),
    ]:
        q, k, queue = (torch.empty(rows, 128, device=device) for rows in (num, num, queue_size))
        queue_loss._init_fn(q, k, queue.to(dtype), *weights, True)
        row_lse._init_fn(q, queue.to(dtype), [6.0], None, False)


if __name__ == "__main__":
    target = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    driver.set_active(target)
    no_launch = mock.patch.object(JITFunction, "run", compile_only)
    no_device = mock.patch("torch.cuda.device", mock.MagicMock())
    with no_launch, no_device, set_wrap_triton_enabled(False), fake_cuda() as fake:
        compile_views(fake.device)
        print(flush=True)
        compile_loss(fake.device)
