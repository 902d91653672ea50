"""Launches of Triton kernels: on the GPU of their tensors, and inside an operator so that torch.compile sees them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, library
from triton.runtime.jit import JITFunction


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """Makes the tensor's GPU the current one, to which Triton launches go."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def traceable(kernel: object) -> object:
    """The kernel, to be launched as `traceable(kernel)[grid](...)` inside a `triton_op`.

    The interpreter's functions (TRITON_INTERPRET=1) are not wrapped: older versions of torch refuse to, and there is
    nothing to compile.
    """
    return library.wrap_triton(kernel) if isinstance(kernel, JITFunction) else kernel
