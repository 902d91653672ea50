"""Lets torch.compile see the Triton kernels inside an operator."""

from __future__ import annotations

from torch import library
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction


def traceable(kernel: object) -> object:
    """The kernel, to be launched as `traceable(kernel)[grid](...)` inside a `triton_op`.

    The interpreter's functions (TRITON_INTERPRET=1) are not wrapped: older versions of torch refuse to, and there is
    nothing to compile.
    """
    return library.wrap_triton(kernel) if isinstance(kernel, (JITFunction, Autotuner)) else kernel
