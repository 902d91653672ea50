"""A network looked at before it is used: built without memory, and tried on images of a size."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

Built = TypeVar("Built")


def build_without_memory(build: Callable[[], Built]) -> Built:
    """What `build` makes, its weights with shapes but no memory; with, where a network runs while it is built."""
    try:
        with _Unallocated():
            return build()
    except RuntimeError:  # that of real numbers meeting weights without: timm's ViTs behind a ResNet
        return build()


class _Unallocated(TorchFunctionMode):
    """(Under torch.device("meta") RegNets cannot be built: they compute their widths with tensors.)"""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return func(*args, **{**kwargs, "device": "meta"}) if func is torch.empty else func(*args, **kwargs)


@torch.no_grad()
def why_refused(network: nn.Module, images: int, size: int, device: str = "cpu") -> str:
    """What is said, in a line, when `network` meets so many images of size x size pixels; "" when it takes them."""
    try:
        network(torch.zeros(images, 3, size, size, device=device))
    except Exception as error:  # every network has its own way to refuse
        return (str(error).splitlines() or [type(error).__name__])[0].removesuffix(".")
    return ""
