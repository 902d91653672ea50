"""Modules whose weights have shapes but no memory: to look at an architecture without building it."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode


class Unallocated(TorchFunctionMode):
    """Within, a module's weights have shapes but no memory. (Under torch.device("meta") RegNets cannot be built:

    they compute their widths with tensors.)
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return func(*args, **{**kwargs, "device": "meta"}) if func is torch.empty else func(*args, **kwargs)
