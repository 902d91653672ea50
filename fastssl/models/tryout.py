"""Ways to examine a network before it is used: to build it without memory, and to try it on images of a size."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

Built = TypeVar("Built")


def build_without_memory(build: Callable[[], Built]) -> Built:
    """Calls `build` so that the weights it makes have shapes but no memory, unless the network needs their values."""
    try:
        with _Unallocated():
            return build()
    except RuntimeError:  # some networks run while they are built (timm's ViTs behind a ResNet): build it for real
        return build()


def first_weights(build: Callable[[], object], num: int) -> set[tuple[int, ...]]:
    """The shapes of the first `num` weights that `build` makes. It is stopped there: the rest takes far longer."""
    unallocated = _Unallocated(num)
    with contextlib.suppress(_Enough), unallocated:
        build()
    return set(unallocated.shapes)


class _Enough(Exception):
    """Ends the building of a network."""


class _Unallocated(TorchFunctionMode):
    """Makes torch.empty, from which weights come, return meta tensors, and does not draw values for them.

    torch.device("meta") would change all tensors, but RegNets compute their widths with real ones.
    """

    def __init__(self, enough: int | None = None) -> None:
        super().__init__()
        self.enough, self.shapes = enough, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.normal_, torch.Tensor.uniform_) and args[0].is_meta:
            return args[0]
        if func is not torch.empty:
            return func(*args, **kwargs)
        if len(self.shapes) == self.enough:
            raise _Enough
        tensor = func(*args, **{**kwargs, "device": "meta"})
        self.shapes.append(tuple(tensor.shape))
        return tensor


@torch.no_grad()
def why_refused(network: nn.Module, images: int, size: int, device: str = "cpu") -> str:
    """The error, in one line, that `network` raises for `images` images of size x size pixels; "" if it takes them."""
    try:
        network(torch.zeros(images, 3, size, size, device=device))
    except Exception as error:  # every network has its own way to refuse
        return (str(error).splitlines() or [type(error).__name__])[0].removesuffix(".")
    return ""
