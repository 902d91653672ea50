"""Triton kernels that torch.compile can see through."""

from __future__ import annotations

from torch import library
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction


def traceable(kernel: object) -> object:
    """`kernel`, to be launched as `traceable(kernel)[grid](...)` inside a `triton_op`.

    The interpreter's functions (TRITON_INTERPRET=1) are launched as they are: older versions of torch refuse to wrap
    them, and the compiler has nothing to see there.
    """
    return library.wrap_triton(kernel) if isinstance(kernel, (JITFunction, Autotuner)) else kernel
