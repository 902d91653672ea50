"""Modules whose weights have shapes but no memory, and whether they take images of a size."""

from __future__ import annotations

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class Unallocated(TorchFunctionMode):
    """Within, a module's weights have shapes but no memory. (Under torch.device("meta") RegNets cannot be built:

    they compute their widths with tensors.)
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return func(*args, **{**kwargs, "device": "meta"}) if func is torch.empty else func(*args, **kwargs)


@torch.no_grad()
def check_image_size(module: nn.Module, arch: str, size: int) -> None:
    """Raises ValueError where an encoder in eval mode, allocated or not, takes no images of `size` pixels.

    They may be too small for it, or it may have one size alone.
    """
    try:
        module(torch.empty(1, 3, size, size, device=next(module.parameters()).device))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{arch} cannot take images of {size} pixels, choose another --image-size: {reason}") from None
