"""The key shuffle sends bytes: view_k as uint8, normalised where it arrives, with the bits of a normalised view."""

from __future__ import annotations

from contextlib import ExitStack
from unittest import mock

import numpy as np
import pytest
import torch
from photos import photo_batch
from ranks import run_ranks
from test_train import POLICY, SIZE, STEPS, make_config, make_step, share
from torch import distributed as dist

from fastssl.augment.fused import make_views_fused
from fastssl.augment.normalise import BITS, MEAN, STD, normalise_bytes
from fastssl.augment.params import ViewParams, sample_both
from fastssl.augment.policy import POLICIES, Policy, make_policy
from fastssl.augment.views import make_view, make_views
from fastssl.config import Config
from fastssl.machine.compiled import numba_obstacle

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NO_NUMBA = numba_obstacle() or ("numba's loops run on a CPU" if DEVICE.type == "cuda" else "")
KERNELS = ["reference", "triton", pytest.param("numba", marks=pytest.mark.skipif(bool(NO_NUMBA), reason=NO_NUMBA))]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = [torch.channels_last, torch.contiguous_format]
SIDES = ((9, 12), (1, 1), (1, 20))  # small: the interpreter takes a millisecond for a pixel and tap
SIZES = [(1, ((2, 3), (1, 1))), (7, SIDES), (33, SIDES)]
IN_ONE_TYPE = (1, 33)  # views that the interpreter, which takes seconds, makes in float32 alone


def skip_what_the_interpreter_rounds_otherwise(kernel: str, dtype: torch.dtype) -> None:
    if (kernel, dtype, DEVICE.type) == ("triton", torch.bfloat16, "cpu"):
        pytest.skip("needs a CUDA GPU")  # the interpreter cuts bfloat16 off instead of rounding


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape and found.device == expected.device
    bits = BITS[found.dtype.itemsize]  # -0 is not 0
    assert torch.equal(found.contiguous().view(bits), expected.contiguous().view(bits))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_view_of_bytes_once_normalised_is_the_view(kernel, dtype, nan_poisoned_empty) -> None:
    skip_what_the_interpreter_rounds_otherwise(kernel, dtype)
    interpreted = (kernel, DEVICE.type) == ("triton", "cpu")
    for size, sides in SIZES:
        if not (interpreted and size in IN_ONE_TYPE and dtype != torch.float32):
            assert_bytes_are_the_view(kernel, dtype, size, sides)


def assert_bytes_are_the_view(kernel: str, dtype: torch.dtype, size: int, sides: tuple) -> None:
    batch, policy = photo_batch(sides).to(DEVICE), make_policy("v2", solarise_p=0.4, blur_p=0.6)
    plain = make_views(batch, policy, size, 1, 2, dtype, kernel)
    view_q, view_k = make_views(batch, policy, size, 1, 2, dtype, kernel, key_bytes=True)
    assert view_k.dtype == torch.uint8 and view_k.is_contiguous(memory_format=torch.channels_last)
    assert_same_bits(view_q, plain[0])
    for layout in LAYOUTS:
        found = normalise_bytes(view_k.contiguous(memory_format=layout), dtype, kernel)
        assert found.is_contiguous(memory_format=layout)
        assert_same_bits(found, plain[1])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_byte_of_every_channel(kernel, dtype, layout, nan_poisoned_empty) -> None:
    skip_what_the_interpreter_rounds_otherwise(kernel, dtype)
    every = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(1, 1, 16, 16)
    x = torch.cat([every.flip(2), every, every.mT], dim=1).repeat(3, 1, 1, 1).contiguous(memory_format=layout)
    mean, std = (torch.tensor(values, device=DEVICE).view(3, 1, 1) for values in (MEAN, STD))
    found = normalise_bytes(x, dtype, kernel)
    torch.testing.assert_close(found, ((x / 255 - mean) / std).to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert_same_bits(found, normalise_bytes(x, dtype, "reference"))


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_views_and_views_larger_than_a_program(kernel) -> None:
    empty = torch.empty(0, 3, 8, 8, dtype=torch.uint8, device=DEVICE)
    assert normalise_bytes(empty, torch.float16, kernel).shape == empty.shape
    batch, policy = photo_batch(((9, 12),)).select(slice(0, 0)).to(DEVICE), make_policy("none")
    assert [len(view) for view in make_views(batch, policy, 8, 0, 0, kernel=kernel, key_bytes=True)] == [0, 0]
    x = torch.randint(0, 256, (2, 3, 65, 65), dtype=torch.uint8, device=DEVICE)
    assert_same_bits(normalise_bytes(x, torch.float32, kernel), normalise_bytes(x, torch.float32, "reference"))


def test_bytes_of_views_by_parameters_that_are_given() -> None:
    batch = photo_batch(SIDES).to(DEVICE)
    for name in POLICIES:
        params = [ViewParams(*(t.to(DEVICE) for t in p)) for p in sample_both(make_policy(name), batch, 3, 0)]
        view_q, view_k = make_views_fused(batch, params, 16, torch.float32, key_bytes=True)
        assert_same_bits(view_q, make_view(batch, params[0], 16))
        assert_same_bits(view_k, make_view(batch, params[1], 16, torch.uint8))


def test_bytes_cannot_hide() -> None:
    with pytest.raises(ValueError, match="key_bytes and hide_and_seek exclude each other: leave"):
        make_views(photo_batch(SIDES), make_policy("v2", hide_and_seek=True), 8, 0, 0, key_bytes=True)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_bytes_are_normalised_in_one_launch_without_waiting(layout) -> None:
    x = torch.randint(0, 256, (4, 3, 96, 96), dtype=torch.uint8, device="cuda").contiguous(memory_format=layout)
    normalise_bytes(x, torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
            normalise_bytes(x, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    launched = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert launched == ["normalise_rows"]


NORMALISE_THEN_SEND = {  # the order whose results the bytes must not change
    "fastssl.train.make_views": lambda *args: make_views(*args[:-1]),
    "fastssl.train.normalise_bytes": lambda x, dtype, kernel: x,
}


def train(rank: int, world_size: int, config: Config, policy: Policy, patches: dict[str, object]):
    """Losses and state after some steps, and how many bytes a value of each part's view_k took on its way."""
    widths, send = [], dist.all_to_all_single

    def all_to_all(received, sent, *counts):
        assert sent.dtype == torch.uint8
        widths.append(sent[0].numel() / (3 * SIZE**2))
        return send(received, sent, *counts)

    with ExitStack() as stack:
        for name, value in (
            {"test_train.POLICY": policy, "torch.distributed.all_to_all_single": all_to_all} | patches
        ).items():
            stack.enter_context(mock.patch(name, value))
        trainee, train_step, _ = make_step(config, rank, world_size)
        losses = [float(train_step(share(step, rank, world_size), step)["loss"]) for step in range(STEPS)]
    return losses, {name: value.numpy() for name, value in trainee.moco.state_dict().items()}, widths


def train_in_both_orders(rank: int, world_size: int, settings: list[dict[str, object]], policy: Policy):
    configs = [make_config(**values) for values in settings]
    return [[train(rank, world_size, c, policy, p) for p in ({}, NORMALISE_THEN_SEND)] for c in configs]


def test_ranks_send_bytes_and_train_as_if_they_had_sent_normalised_views() -> None:
    """A value travels as 1 byte instead of 4 or 2, and not a bit of the result changes."""
    settings = [{"precision": "fp32", "accumulate": 2}, {"precision": "bf16"}]
    for world_size in (2, 4):
        for runs in run_ranks(train_in_both_orders, world_size, settings, POLICY):
            for (by_bytes, normalised), sends, width in zip(runs, (2 * STEPS, STEPS), (4, 2)):
                assert by_bytes[0] == normalised[0]
                for name, value in by_bytes[1].items():
                    np.testing.assert_array_equal(value, normalised[1][name], err_msg=name)
                assert by_bytes[2] == [1] * sends and normalised[2] == [width] * sends


def test_views_that_hide_and_seek_travel_normalised() -> None:
    config, policy = make_config(), make_policy("v2", hide_and_seek=True)
    assert [widths for _, _, widths in run_ranks(train, 2, config, policy, {})] == [[4] * STEPS] * 2


def test_one_process_makes_no_bytes() -> None:
    def refuse(*args):
        raise AssertionError("a second pass over memory")

    _, _, widths = train(0, 1, make_config(bn_splits=2), POLICY, {"fastssl.train.normalise_bytes": refuse})
    assert widths == []
