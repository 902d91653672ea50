"""The views by numba's loops on a CPU: the bits of the PyTorch reference, on any number of threads."""

from __future__ import annotations

import itertools
import sys
import threading

import numpy as np
import pytest
import torch
from photos import photo_batch

from fastssl.augment.choose import choose_augment_kernel
from fastssl.augment.params import ViewParams, sample_both
from fastssl.augment.policy import POLICIES, make_policy
from fastssl.augment.resample import crop_axes, resample_reference
from fastssl.augment.views import make_view, make_views
from fastssl.batch import ImageBatch

pytest.importorskip("numba", reason="needs numba")

from fastssl.augment.compiled_resample import resize_boxes
from fastssl.augment.compiled_views import make_views_compiled
from fastssl.machine.threads import make_threads, run_in_threads

EVERYTHING = {"solarise_p": 0.4, "hide_and_seek": True, "blur_p": 0.6}
SIDES = ((40, 52), (33, 20), (1, 1), (1, 60), (300, 200), (64, 64))
CPU = torch.device("cpu")


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype and found.is_contiguous(memory_format=torch.channels_last)
    bits = torch.int32 if found.dtype == torch.float32 else torch.int16  # -0 is not 0
    assert torch.equal(*(view.permute(0, 2, 3, 1).contiguous().view(bits) for view in (found, expected)))


def assert_reference(batch: ImageBatch, params: tuple[ViewParams, ViewParams], size: int, dtype=torch.float32) -> None:
    for found, p in zip(make_views_compiled(batch, params, size, (dtype, dtype)), params):
        assert_same_bits(found, make_view(batch, p, size, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 7, 64, 150])
def test_every_policy_has_the_bits_of_the_reference(size: int, dtype: torch.dtype) -> None:
    batch = photo_batch(SIDES)
    for seed, name in enumerate(POLICIES):
        assert_reference(batch, sample_both(make_policy(name, **EVERYTHING), batch, seed, 2), size, dtype)


def test_each_order_of_the_jitter_and_each_strength() -> None:
    batch = photo_batch(((20, 30),) * 24)
    view_q, view_k = sample_both(make_policy("v2", jitter_p=1.0), batch, 0, 0)
    orders = torch.arange(24, dtype=torch.int32)
    strongest = {"brightness": 0.0, "contrast": 2.0, "saturation": 0.0, "hue": 0.5}
    nothing = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
    for factors in ({}, strongest, nothing, {"contrast": 0.0, "hue": -0.5, "saturation": 2.5}):
        values = {name: torch.full((24,), value) for name, value in factors.items()}
        assert_reference(batch, (view_q._replace(order=orders, **values), view_k._replace(order=orders)), 24)


@pytest.mark.parametrize("sigma", [0.01, 0.1, 0.7, 2.0])
def test_blurs_wider_than_the_view_and_of_no_width(sigma: float) -> None:
    batch = photo_batch(SIDES)
    view_q, view_k = sample_both(make_policy("v2", blur_p=1.0), batch, 0, 0)
    wide = view_q._replace(sigma=torch.full_like(view_q.sigma, sigma))
    for size in (1, 3, 40):
        assert_reference(batch, (wide, view_k), size)


def test_windows_into_a_larger_tensor_and_an_empty_batch() -> None:
    batch, policy = photo_batch(SIDES), make_policy("v2", **EVERYTHING)
    pixels = torch.cat([torch.zeros(5, dtype=torch.uint8), batch.pixels, batch.pixels])[5:]
    for part in (batch.select(slice(2, 5)), batch._replace(pixels=pixels), batch.select(slice(0, 0))):
        views = [make_views(part, policy, 16, 1, 0, kernel=kernel) for kernel in ("numba", "reference")]
        for found, expected in zip(*views):
            assert_same_bits(found, expected)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_any_number_of_threads_gives_the_same_bits_and_leaves_torch_its_own(threads) -> None:
    batch, policy = photo_batch(SIDES * 8), make_policy("v2", **EVERYTHING)
    expected = make_views(batch, policy, 32, 1, 0, kernel="reference")
    for num in (1, 2, 3):
        threads(num)
        for found, view in zip(make_views(batch, policy, 32, 1, 0, kernel="numba"), expected):
            assert_same_bits(found, view)
        assert torch.get_num_threads() == num


def test_threads_compute_alone_and_report_what_fails(threads) -> None:
    threads(2)
    seen, both = [], threading.Barrier(2, timeout=20)

    def work(item: int) -> None:
        both.wait()  # neither of two threads does it all
        seen.append((item, torch.get_num_threads()))

    run_in_threads(work, range(4))
    assert sorted(seen) == list(zip(range(4), itertools.repeat(1)))
    assert make_threads(2, 0) is not make_threads(3, 0)
    with pytest.raises(ZeroDivisionError):
        run_in_threads(lambda item: 1 // item, [1, 0, 2])


def test_a_cpu_takes_them_and_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_augment_kernel(CPU) == ("numba", "on a CPU")
    assert choose_augment_kernel(CPU, "numba") == ("numba", "requested")
    with pytest.raises(ValueError, match=r"the numba augmentation kernel cannot run .* not on cuda"):
        choose_augment_kernel(torch.device("cuda"), "numba")
    monkeypatch.setitem(sys.modules, "numba", None)
    assert choose_augment_kernel(CPU) == ("reference", "numba is not installed: pip install numba")
    with pytest.raises(ValueError, match="pip install numba"):
        choose_augment_kernel(CPU, "numba")


def test_without_numba_the_views_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, policy = photo_batch(SIDES), make_policy("v2", **EVERYTHING)
    expected = make_views(batch, policy, 20, 1, 0)
    monkeypatch.setitem(sys.modules, "numba", None)
    for found, view in zip(make_views(batch, policy, 20, 1, 0), expected):
        assert_same_bits(found, view)


@pytest.mark.parametrize("size", [1, 7, 64, 224])
def test_boxes_are_resized_with_the_bits_of_the_reference(size: int) -> None:
    batch = photo_batch((*SIDES, (1, 5000), (5000, 1), (64, 64), (17, 33)))
    for seed in range(3):
        params, _ = sample_both(make_policy("v2", crop_scale=(0.001, 1.0)), batch, seed, 0)
        boxes = torch.stack([params.top, params.left, params.crop_height, params.crop_width], dim=1)
        out = np.zeros((batch.size, size, size, 3), np.uint8)
        resize_boxes(*(tensor.numpy() for tensor in (batch.pixels, batch.offset, batch.width, boxes)), out)
        expected = resample_reference(batch, *crop_axes(params, size), size)
        assert np.array_equal(out, expected.permute(0, 2, 3, 1).numpy())
