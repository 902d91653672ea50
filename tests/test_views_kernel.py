"""The Triton kernels of the views: the bits of the PyTorch chain, interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from photos import photo_batch, render_photo

from fastssl.augment.choose import choose_augment_kernel
from fastssl.augment.fused import MAX_BATCH, make_tables, make_views_fused, policy_table
from fastssl.augment.normalise import MEAN, STD
from fastssl.augment.params import ViewParams, sample_both
from fastssl.augment.policy import POLICIES, Policy, make_policy
from fastssl.augment.views import make_view, make_views
from fastssl.batch import ImageBatch, pack_images
from fastssl.kernels.views import COMPILED, INTERPRETED, Draw, Launch, Windows, empty_tables, views_triton
from fastssl.kernels.views_jitter import jitter_rows
from fastssl.loaders.synthetic_loader import SyntheticLoader
from fastssl.machine import triton_device

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVERYTHING = {"solarise_p": 0.4, "hide_and_seek": True, "blur_p": 0.6}
SMALL = ((40, 52), (33, 20), (1, 1), (1, 60))  # few and small: the interpreter takes a millisecond for a pixel and tap


def assert_same_bits(batch: ImageBatch, params: tuple[ViewParams, ViewParams], size: int, dtype=torch.float32) -> None:
    batch, params = batch.to(DEVICE), [ViewParams(*(t.to(DEVICE) for t in p)) for p in params]
    for found, p in zip(make_views_fused(batch, params, size, dtype), params):
        assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(found, make_view(batch, p, size, dtype))


def with_boxes(params: ViewParams, boxes: list[tuple[int, int, int, int]]) -> ViewParams:
    top, left, height, width = (torch.tensor(side, dtype=torch.int32) for side in zip(*boxes))
    return params._replace(top=top, left=left, crop_height=height, crop_width=width)


@pytest.mark.parametrize(
    ("name", "size", "sides"),
    [(name, 32, SMALL) for name in POLICIES]
    + [("small", 1, ((2, 3),)), ("v2", 1, ((2, 3),)), ("v1", 7, ((9, 12),)), ("small", 65, ((50, 60),))],
)
def test_kernel_has_the_bits_of_the_reference(name: str, size: int, sides: tuple, nan_poisoned_empty: None) -> None:
    batch = photo_batch(sides)
    assert_same_bits(batch, sample_both(make_policy(name, **EVERYTHING), batch, 1, 2), size)


DRAWN = {
    **{name: {} for name in POLICIES},
    "extremes": {"crop_ratio": (0.01, 100.0), "crop_scale": (1e-6, 1.0), "brightness": 3.0, "grey_first": True},
    "nothing": {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "hue": 0.0, "flip_p": 0.0, "contrast": 0.0},
}


@pytest.mark.parametrize(
    ("name", "seed", "epoch"),
    [(name, 0, 0) for name in ("v1", "v2", "none", "nothing")] + [("small", -3, 2**31 + 5), ("extremes", 2**63 + 7, 1)],
)
def test_parameters_drawn_in_the_kernel_have_the_bits_of_the_reference(name: str, seed: int, epoch: int) -> None:
    """Crops that fit at the first try, at a later one and never; indices and keys beyond 32 bits."""
    policy = make_policy(name if name in POLICIES else "small", **EVERYTHING, **DRAWN[name])
    sides = ((9, 12), (1, 1)) if name in ("v1", "v2", "none") else ((9, 12), (1, 1), (1, 40), (40, 1), (7, 3))
    batch = photo_batch(sides)
    batch = batch._replace(index=batch.index + torch.tensor([0, 2**33, 5, 2**40 + 1, 3])[: len(sides)]).to(DEVICE)
    drawn = draw_tables(batch, policy, seed, epoch)
    both = ViewParams(*(torch.cat(fields) for fields in zip(*sample_both(policy, batch, seed, epoch))))
    for found, expected in zip(drawn, make_tables(both)):
        assert found.dtype == expected.dtype and torch.equal(found, expected)


def draw_tables(batch: ImageBatch, policy: Policy, seed: int, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The tables that launch one writes."""
    windows = Windows(batch.pixels, batch.offset, batch.height, batch.width, batch.index)
    tables = empty_tables(windows)
    signed = (seed + 2**63) % 2**64 - 2**63
    views_triton(
        windows, tables, Draw(policy_table(policy, batch.pixels.device), signed, epoch), 2, MEAN, STD, torch.float32
    )
    return tables


@pytest.mark.gpu
def test_many_drawn_parameters() -> None:
    loader = SyntheticLoader(num_images=4096, size=16, batch_size=4096, seed=0, device="cuda")
    batch = next(loader.batches())
    sides = torch.randint(1, 17, (2, 4096), dtype=torch.int32, device="cuda")
    batch = batch._replace(height=sides[0], width=sides[1])
    for policy in (make_policy(name, **EVERYTHING) for name in POLICIES):
        both = ViewParams(*(torch.cat(fields) for fields in zip(*sample_both(policy, batch, 1, 2))))
        assert all(torch.equal(a, b) for a, b in zip(draw_tables(batch, policy, 1, 2), make_tables(both)))


@pytest.mark.gpu
def test_both_views_take_three_launches() -> None:
    batch, policy = photo_batch().to("cuda"), make_policy("small", **EVERYTHING)
    make_views(batch, policy, 32, 0, 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        make_views(batch, policy, 32, 0, 1)
        torch.cuda.synchronize()
    launched = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert sorted(launched) == ["crop_tiles", "finish_tiles", "jitter_rows"]


def test_every_order_of_the_jitter() -> None:
    """With contrast in each place: what stands before it belongs to the first launch, what follows to the second."""
    batch = photo_batch(((20, 24),) * 12)
    params = sample_both(make_policy("small", jitter_p=1.0, blur_p=0.3), batch, 0, 0)
    order = torch.arange(24, dtype=torch.int32).split(12)
    assert_same_bits(batch, [p._replace(order=o) for p, o in zip(params, order)], 24)


def test_mean_of_a_view_whose_luma_passes_32_bits() -> None:
    """White, 2100 pixels a side: contrast 0 leaves the mean of it, by launch two alone."""
    size, tile = 2100, 64
    tiles = (size // tile + 1) ** 2
    batch = photo_batch(((4, 4),))
    params = sample_both(make_policy("v2", blur_p=0.0, jitter_p=1.0, grey_p=0.0), batch, 0, 0)[0]
    params = params._replace(
        brightness=torch.ones(1), contrast=torch.zeros(1), saturation=torch.ones(1), hue=torch.zeros(1)
    )
    ints, floats = (table.to(DEVICE) for table in make_tables(params))
    planes = torch.full((1, 3, size, size), 255, dtype=torch.uint8, device=DEVICE)
    luma = torch.full((1, tiles), 255 * size * size // tiles, dtype=torch.int32, device=DEVICE)
    luma[0, 0] += 255 * size * size % tiles
    taps, rows = floats.new_empty(1, 16), planes.new_empty(0, dtype=torch.int16)
    cut = COMPILED if DEVICE == "cuda" else INTERPRETED  # a GPU's compiler would take minutes for a larger block
    blocks = {"BLOCK": cut.block, "BLOCK_TILES": 2048, "num_warps": cut.warps[1]}
    jitter_rows[(1, 1)](planes, rows, luma, taps, ints, floats, size, tiles, 8, **blocks)
    assert (planes == 255).all()


@pytest.mark.parametrize("missing", ["brightness", "contrast", "saturation", "hue"])
def test_operations_that_change_nothing_are_left_out(missing: str) -> None:
    batch = photo_batch(((20, 24),) * 3)
    params = sample_both(make_policy("small", jitter_p=1.0, blur_p=0.0, **{missing: 0.0}), batch, 0, 0)
    number = ["brightness", "contrast", "saturation", "hue"].index(missing)
    plan = make_tables(params[0])[0][:, 6]
    assert not any((plan >> 3 * p & 7).eq(number).any() for p in range(4))
    assert_same_bits(batch, params, 24)


GPU_ONLY = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # the interpreter cuts bfloat16 off instead of rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, GPU_ONLY], ids=str)
def test_output_formats(dtype: torch.dtype, nan_poisoned_empty: None) -> None:
    batch = photo_batch(SMALL)
    assert_same_bits(batch, sample_both(make_policy("v2", **EVERYTHING), batch, 0, 0), 32, dtype)


def test_every_sigma() -> None:
    sigmas = torch.tensor([0.1, 0.24, 0.25, 0.26, 0.7, 1.3, 1.99, 2.0])
    batch = photo_batch(((20, 24),) * 4)
    params = sample_both(make_policy("v2", blur_p=1.0, jitter_p=0.0), batch, 0, 0)
    assert_same_bits(batch, [p._replace(sigma=s) for p, s in zip(params, sigmas.split(4))], 24)


def test_crops_that_touch_every_border_and_sizes_above_the_image() -> None:
    sides = (13, 17)
    batch = photo_batch((sides,) * 4)
    h, w = sides
    corners = [(0, 0, 5, 9), (0, w - 9, 5, 9), (h - 5, 0, 5, 9), (h - 5, w - 9, 5, 9)]
    edges = [(0, 0, h, w), (0, 3, h, 1), (h - 1, 0, 1, w), (h - 1, w - 1, 1, 1)]
    params = sample_both(make_policy("v1"), batch, 0, 0)
    for size in (12, 40):
        assert_same_bits(batch, [with_boxes(p, boxes) for p, boxes in zip(params, (corners, edges))], size)


@pytest.mark.parametrize("sides", [(1, 1), (1, 500), (500, 1), (200, 150)])
def test_awkward_windows(sides: tuple[int, int]) -> None:
    batch = photo_batch((sides,))
    whole = [(0, 0, *sides)]
    assert_same_bits(batch, [with_boxes(p, whole) for p in sample_both(make_policy("v1"), batch, 0, 0)], 64)


@pytest.mark.parametrize(("sides", "size"), [((1, 1), 3), ((1, 5000), 2), ((5000, 1), 2), ((3, 2), 9)])
@pytest.mark.parametrize("name", ["small", "none"])
def test_awkward_windows_with_drawn_parameters(name: str, sides: tuple[int, int], size: int) -> None:
    """A single pixel, needles, views larger than the image: by the reference and by the kernel."""
    images = [render_photo(*sides, seed, grey=seed == 0) for seed in range(2)]
    batch, policy = pack_images(images, [0, 1], [0, 0]).to(DEVICE), make_policy(name, **EVERYTHING)
    found, expected = (make_views(batch, policy, size, 0, 0, kernel=kernel) for kernel in ("triton", "reference"))
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(found, expected))


def test_crops_at_the_far_ends_of_a_window_of_5000_pixels() -> None:
    """Of so many pixels the interpreter can only read few: those of its corners."""
    side = 5000
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    batch = pack_images([image], [0], [0]).select(torch.zeros(4, dtype=torch.int64))
    far = [(side - 9, side - 7, 9, 7), (side - 1, side - 1, 1, 1), (side - 1, 0, 1, 9), (0, side - 1, 9, 1)]
    assert_same_bits(batch, [with_boxes(p, far) for p in sample_both(make_policy("v1"), batch, 0, 0)], 3)


@pytest.mark.gpu
def test_a_window_of_5000_pixels() -> None:
    batch = pack_images([render_photo(5000, 5000, 0)], [0], [0])
    params = [with_boxes(p, [(0, 0, 5000, 5000)]) for p in sample_both(make_policy("v2"), batch, 0, 0)]
    for size in (32, 224):
        assert_same_bits(batch, params, size)


@pytest.mark.gpu
def test_windows_beyond_two_gigabytes() -> None:
    """Offsets are 64 bits wide: the same image behind 2^31 bytes."""
    batch = photo_batch(((40, 52), (33, 20)))
    far = torch.zeros(2**31 + len(batch.pixels) + 64, dtype=torch.uint8, device="cuda")
    far[-len(batch.pixels) :] = batch.pixels.cuda()
    moved = batch.to("cuda")._replace(pixels=far, offset=batch.offset.cuda() + len(far) - len(batch.pixels))
    policy = make_policy("small", **EVERYTHING)
    for a, b in zip(make_views(moved, policy, 32, 0, 0), make_views(batch.to("cuda"), policy, 32, 0, 0)):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [32, 96, 224, 384])
def test_compiled_kernel_at_real_sizes(size: int) -> None:
    batch = photo_batch(((300, 420), (160, 107), (224, 224), (640, 480)) * 4)
    assert_same_bits(batch, sample_both(make_policy("small", **EVERYTHING), batch, 0, 0), size)


@pytest.mark.gpu
def test_the_kernel_never_makes_the_host_wait() -> None:
    batch, policy = photo_batch().to("cuda"), make_policy("small", **EVERYTHING)
    make_views(batch, policy, 32, 0, 0, kernel="triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        make_views(batch, policy, 32, 0, 1, kernel="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(DEVICE == "cuda", reason="the compiled kernels have one way of being cut")
def test_the_cut_does_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes end within a tile, and a program of launch two has more than one block."""
    batch = photo_batch(((33, 20),))
    params = sample_both(make_policy("small", **EVERYTHING), batch, 0, 0)
    for cut, size in ((Launch(16, 2, 100, 64), 17), (COMPILED, 33)):
        monkeypatch.setattr(f"{views_triton.__module__}.INTERPRETED", cut)
        assert_same_bits(batch, params, size)
    assert INTERPRETED != COMPILED


def test_grey_sources_stay_grey() -> None:
    batch = pack_images([render_photo(30, 40, s, grey=True) for s in range(3)], range(3), [0] * 3).to(DEVICE)
    policy = make_policy("v2", hue=0.5, jitter_p=1.0)
    for view in make_views(batch, policy, 32, 0, 0, kernel="triton"):
        pixels = view * torch.tensor(STD, device=DEVICE).view(3, 1, 1) + torch.tensor(MEAN, device=DEVICE).view(3, 1, 1)
        assert (pixels - pixels[:, :1]).abs().max() < 1e-5


def test_make_views_takes_the_kernel_asked_for() -> None:
    batch, policy = photo_batch(SMALL).to(DEVICE), make_policy("v2", **EVERYTHING)
    views = [make_views(batch, policy, 32, 0, 0, kernel=kernel) for kernel in ("triton", "reference")]
    assert all(torch.equal(a, b) for a, b in zip(*views))
    empty = batch.select(slice(0, 0))
    assert [v.shape for v in make_views(empty, policy, 32, 0, 0, kernel="triton")] == [(0, 3, 32, 32)] * 2


@pytest.mark.parametrize("kernel", ["triton", "numba", "reference"])
def test_every_second_image_and_a_narrow_index(kernel: str) -> None:
    batch, policy = photo_batch(((9, 7),) * 4), make_policy("v2", **EVERYTHING)
    device = DEVICE if kernel == "triton" else "cpu"
    expected = make_views(batch.select(torch.tensor([0, 2])), policy, 4, 0, 0, kernel="reference")
    some = batch._replace(index=batch.index.int()).to(device).select(slice(None, None, 2))
    for found, view in zip(make_views(some, policy, 4, 0, 0, kernel=kernel), expected):
        assert torch.equal(found.cpu(), view)


def test_more_images_than_a_launch_has_programs_for() -> None:
    batch = photo_batch(((9, 7),)).to(DEVICE).select(torch.zeros(MAX_BATCH + 1, dtype=torch.int64, device=DEVICE))
    with pytest.raises(ValueError, match="at most 32,767 images, got 32,768: set --accumulate or a smaller"):
        make_views(batch, make_policy("v2"), 4, 0, 0, kernel="triton")


def test_choice_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert choose_augment_kernel(cpu, "reference") == ("reference", "requested")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"cannot run \(no CUDA device\): use --augment-kernel auto"):
        choose_augment_kernel(cpu, "triton")
    with pytest.raises(ValueError, match=r"unknown augmentation kernel 'cuda': .* auto, triton, numba, reference"):
        choose_augment_kernel(cpu, "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose_augment_kernel(torch.device("cuda")) == (
        "reference",
        "the GPU is older than compute capability 8.0",
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for obstacle, kernel in ((None, "triton"), ("Triton cannot start", "reference")):
        monkeypatch.setattr(triton_device, "start_obstacle", lambda obstacle=obstacle: obstacle)
        assert choose_augment_kernel(torch.device("cuda")) == (kernel, obstacle or "on a CUDA")
