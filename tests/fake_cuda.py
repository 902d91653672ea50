"""A CUDA device that is not there: shapes, dtypes and devices are real, no number is computed.

Within `fake_cuda()` tensors are torch's fake ones, which refuse operands on two devices. Within its `no_waiting()` what
would make the host wait for a GPU raises `HostWaits`: a number read, a shape that depends on numbers, a copy that is
not from pinned memory.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COPIES = ("aten::_to_copy", "aten::copy_")
# An older torch, as 2.6, asks the driver which device is current when a fake tensor is indexed, and without one aborts.
needs_fake_cuda = pytest.mark.skipif(
    not hasattr(torch._C, "_ensureCUDADeviceGuardSet"), reason="needs a torch that can fake a CUDA device"
)


class HostWaits(AssertionError):
    """Something that torch.cuda.set_sync_debug_mode("error") would refuse on a GPU."""


class FakeCuda(TorchDispatchMode):
    """Watches every operation; keeps which tensors are pinned, of which fake tensors know nothing."""

    device = torch.device("cuda", 0)

    def __init__(self) -> None:
        super().__init__()
        self.may_wait, self.waits = True, 0

    @contextlib.contextmanager
    def no_waiting(self) -> Iterator[None]:
        """As torch.cuda.set_sync_debug_mode("error") on a GPU."""
        self.may_wait = False
        try:
            yield
        finally:
            self.may_wait = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.name()
        if name == "aten::is_pinned":
            return getattr(args[0], "in_pinned_memory", False)
        if name == "aten::_pin_memory":
            copy = args[0].clone()
            copy.in_pinned_memory = True
            return copy
        if name == "aten::_local_scalar_dense" and args[0].device.type == "cpu":
            return 0  # the host reads its own numbers without waiting; here there are none
        if name.startswith("aten::_fused_"):  # torch has no fake of these
            assert {x.device for x in tree_leaves((args, kwargs)) if isinstance(x, FakeTensor)} == {self.device}
            return None
        try:
            out = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise HostWaits(f"{name} reads numbers") from error
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, FakeTensor)]
        on_host = [x for x in tensors if x.device.type == "cpu"]
        if len(on_host) not in (0, len(tensors)) and (reason := self._why_waits(name, args, kwargs, on_host)):
            self.waits += 1
            if not self.may_wait:
                raise HostWaits(reason)
        return out

    def _why_waits(self, name: str, args: tuple, kwargs: dict, on_host: list[FakeTensor]) -> str:
        """Of an operation with tensors on both devices; "" where nothing waits."""
        if name in COPIES:
            source, non_blocking = args[0], kwargs.get("non_blocking", False)
            if name == "aten::copy_":
                source, non_blocking = args[1], non_blocking or args[2:3] == (True,)
            pinned = getattr(source, "in_pinned_memory", False)
            return "" if pinned and non_blocking else f"{name} from {source.device}: memory not pinned, or it blocks"
        # a single number of the host's goes along with the launch
        return f"{name} takes a tensor of the host" if any(x.ndim for x in on_host) else ""


def copy_of(tensor: torch.Tensor, memo: dict) -> torch.Tensor:
    """A deep copy."""
    copy = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    copy = torch.nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else copy
    return memo.setdefault(id(tensor), copy)


@torch.no_grad()
def walk_back(loss: torch.Tensor) -> None:
    """`loss.backward()` in Python: torch's own engine asks the driver for streams."""
    waits_for, nodes = Counter(), [loss.grad_fn]
    for node in nodes:  # grows on the way
        for following, _ in node.next_functions:
            if following is not None:
                nodes += [following] * (not waits_for[following])
                waits_for[following] += 1
    gradients, ready = {loss.grad_fn: {0: torch.ones_like(loss)}}, [loss.grad_fn]
    while ready:
        node = ready.pop()
        incoming = gradients.pop(node, {})
        if hasattr(node, "variable"):  # a leaf
            leaf, gradient = node.variable, incoming[0]
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
            continue
        run = getattr(node, "apply", node)
        outgoing = run(*map(incoming.get, range(len(node._input_metadata)))) if incoming else ()
        outgoing = outgoing if isinstance(outgoing, tuple) else (outgoing,)
        for i, (following, place) in enumerate(node.next_functions):
            if following is None:
                continue
            if i < len(outgoing) and outgoing[i] is not None:
                wanted, sums = following._input_metadata[place], gradients.setdefault(following, {})
                gradient = outgoing[i].sum_to_size(wanted.shape).to(wanted.dtype)
                sums[place] = sums[place] + gradient if place in sums else gradient
            waits_for[following] -= 1
            if not waits_for[following]:
                ready.append(following)


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Fake tensors within, and an H200 to ask for its properties."""
    properties = mock.Mock(multi_processor_count=132, major=9, minor=0)
    patches = {
        "torch.cuda.is_bf16_supported": lambda **_: True,
        "torch.cuda.is_current_stream_capturing": lambda: False,
        "torch.cuda.get_device_capability": lambda device=None: (9, 0),
        "fastssl.machine.triton_device.start_obstacle": lambda: None,
        "torch.cuda.get_device_properties": lambda device=None: properties,
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.utils.weakref.getweakrefs": lambda tensor: [],  # fake weights have some, and could not change device
        "torch.Tensor.backward": walk_back,
        "torch.cuda.synchronize": lambda device=None: None,
        "torch.cuda.get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "torch.cuda.set_rng_state": lambda state, device=None: None,
        "torch.Tensor.__deepcopy__": copy_of,
    }
    with (
        FakeTensorMode(),
        FakeCuda() as fake,
        contextlib.ExitStack() as stack,
    ):  # the mode first: it looks for a real GPU
        for name, value in patches.items():
            stack.enter_context(mock.patch(name, value))
        yield fake
