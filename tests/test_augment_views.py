"""Whole views: the chain in its order, the same bits in any batch, evaluation views, previews, and GPUs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms as transforms
import torchvision.transforms.functional as reference
from photos import SIZES, photo_batch, render_photo
from PIL import Image
from test_augment_ops import true_gaussian

from fastssl.augment import jitter, views
from fastssl.augment.params import ViewParams, sample_params
from fastssl.augment.policy import POLICIES, make_policy
from fastssl.augment.preview import _in_two_lines, describe, save_preview
from fastssl.augment.resample import crop_axes, resample_reference
from fastssl.augment.views import make_eval_view, make_view, make_views
from fastssl.batch import ImageBatch, pack_images

EVERYTHING = {"solarise_p": 0.2, "hide_and_seek": True}


def part_of(batch: ImageBatch, rows: torch.Tensor | slice) -> ImageBatch:
    return batch.select(rows)


def pillow_view(image: np.ndarray, p: ViewParams, i: int, size: int) -> np.ndarray:
    """The whole chain for image i in Pillow, torchvision and float64: (size, size, 3) in 0..255."""
    box = (p.left[i], p.top[i], p.left[i] + p.crop_width[i], p.top[i] + p.crop_height[i])
    view = Image.fromarray(image).crop([int(side) for side in box]).resize((size, size), Image.Resampling.BILINEAR)
    if p.flip[i]:
        view = reference.hflip(view)
    if p.grey_before[i]:
        view = reference.to_grayscale(view, 3)
    if p.jitter[i]:
        for number in list(itertools.permutations(range(4)))[int(p.order[i])]:
            name = ("brightness", "contrast", "saturation", "hue")[number]
            view = getattr(reference, f"adjust_{name}")(view, float(getattr(p, name)[i]))
    if p.grey_after[i]:
        view = reference.to_grayscale(view, 3)
    pixels = np.asarray(view).astype(np.float64)
    if p.blur[i]:
        pixels = np.round(true_gaussian(pixels, float(p.sigma[i])))
    return np.where((pixels >= 128) & bool(p.solarise[i]), 255 - pixels, pixels)


def normalised(pixels: np.ndarray) -> np.ndarray:
    """torchvision's ToTensor and Normalize in float64, (S, S, 3) -> (3, S, S)."""
    return ((pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).transpose(2, 0, 1)


def in_bytes(view: torch.Tensor) -> np.ndarray:
    """(B, 3, S, S) normalised -> (B, S, S, 3) in 0..255, float64."""
    return (view.double().permute(0, 2, 3, 1).numpy() * [0.229, 0.224, 0.225] + [0.485, 0.456, 0.406]) * 255


@pytest.mark.parametrize("name", POLICIES)
def test_whole_chain_without_resizing_is_pillows(name: str) -> None:
    """Crops of their own size are not resampled, so what is left to differ is a hue level or a rounding of the blur."""
    size, policy = 40, make_policy(name, solarise_p=0.0)
    batch = pack_images([render_photo(size, size, s) for s in range(24)], range(24), [0] * 24)
    p = sample_params(policy, batch, 3, 0, 0)
    p = p._replace(top=p.top * 0, left=p.left * 0, crop_height=p.top * 0 + size, crop_width=p.top * 0 + size)
    ours = make_view(batch, p, size)
    for i in range(24):
        expected = normalised(pillow_view(batch.image(i).numpy(), p, i, size))
        error = np.abs(ours[i].numpy() - expected) * 255 * 0.225
        if not p.jitter[i] and not p.blur[i]:
            assert error.max() < 1e-4
        assert (error > 1.05).mean() < 0.01 and error.mean() < (0.3 if p.blur[i] else 0.05), (i, error.max())


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("size", [32, 96])
def test_whole_chain_is_close_to_pillows(name: str, size: int) -> None:
    """A byte's difference after the crop is stretched by contrast and saturation, and by hue where colours are pale."""
    batch = photo_batch(SIZES * 3)
    p = sample_params(make_policy(name, solarise_p=0.2), batch, 0, 0, 1)
    ours = in_bytes(make_view(batch, p, size))
    errors = []
    for i in range(batch.size):
        expected = pillow_view(batch.image(i).numpy(), p, i, size)
        near_threshold = bool(p.solarise[i]) & (np.abs(np.minimum(expected, 255 - expected) - 127) <= 3)
        errors.append(np.where(near_threshold, 0, np.abs(ours[i] - expected)))
        assert errors[-1].mean() < 1.0, i
    errors = np.stack(errors)
    assert errors.mean() < 0.3 and np.quantile(errors, 0.99) <= 3


def test_order_of_grey_and_jitter() -> None:
    """v1 greys first, so that saturation and hue have nothing to act on; v2 and small grey what they made."""
    batch = photo_batch(((64, 64),) * 8)
    size = 32
    for name, first in (("v1", True), ("v2", False), ("small", False)):
        policy = make_policy(name, grey_p=1.0, jitter_p=1.0, blur_p=0.0)
        p = sample_params(policy, batch, 0, 0, 0)
        assert (p.grey_before if first else p.grey_after).all() and not (p.grey_after if first else p.grey_before).any()
        view = in_bytes(make_view(batch, p, size))
        assert np.abs(view - view[..., :1]).max() < 1e-3
        no_colour = p._replace(saturation=p.saturation * 0 + 1, hue=p.hue * 0)
        assert torch.equal(make_view(batch, no_colour, size), make_view(batch, p, size)) == first


def test_contrast_turns_on_the_mean_at_its_place_in_the_order() -> None:
    """Brightness before or after a contrast of 0 decides which grey is left."""
    batch = pack_images([np.full((8, 8, 3), 100, dtype=np.uint8)] * 2, [0, 1], [0, 0])
    p = sample_params(make_policy("v2", jitter_p=1.0, blur_p=0.0, grey_p=0.0), batch, 0, 0, 0)
    half, zero, one = (torch.full((2,), v) for v in (0.5, 0.0, 1.0))
    p = p._replace(order=torch.tensor([0, 6]).int(), brightness=half, contrast=zero, saturation=one, hue=zero)
    assert in_bytes(make_view(batch, p, 8)).round()[:, 0, 0, 0].tolist() == [50, 50]
    dim = pack_images([render_photo(30, 30, 1)] * 2, [0, 1], [0, 0])
    doubled = p._replace(
        top=half.int() * 0,
        left=half.int() * 0,
        crop_height=half.int() * 0 + 30,
        crop_width=half.int() * 0 + 30,
        brightness=half * 5,
    )
    first, last = in_bytes(make_view(dim, doubled, 30)).round()[:, 0, 0, 0]
    clipped = np.minimum(render_photo(30, 30, 1).astype(int) * 5 // 2, 255)
    luma = (clipped @ [19595, 38470, 7471] + 32768) >> 16
    assert first == int(luma.mean() + 0.5) and last > first  # clipping lowers the mean of the brightened image


@pytest.fixture(params=["auto", "reference"])
def make(request: pytest.FixtureRequest) -> Callable:
    """`views.make_views` by the kernel of the CPU, or the reference."""
    return partial(views.make_views, kernel=request.param)


@pytest.mark.parametrize("size", [24, 150])
def test_threads_change_nothing(size: int, make: Callable) -> None:
    """Several threads, each with images of its own: the same bits, errors are raised, the setting is left as it was."""
    batch, policy = photo_batch(SIZES[:6]), make_policy("small", **EVERYTHING)
    alone = make(batch, policy, size, 1, 2)
    torch.set_num_threads(3)
    try:
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(alone, make(batch, policy, size, 1, 2)))
        assert torch.get_num_threads() == 3
        with torch.inference_mode():
            assert torch.equal(make(batch, policy, size, 1, 2)[0], alone[0])
        broken = batch._replace(offset=batch.offset + len(batch.pixels))
        with pytest.raises(ValueError, match="outside the bytes"):
            make(broken, policy, size, 1, 2)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("size", [32, 72])
def test_a_view_has_the_same_bits_in_any_batch(size: int, make: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = photo_batch(SIZES + ((90, 90),) * 5)
    policy = make_policy("small", **EVERYTHING)
    whole = make(batch, policy, size, 1, 2)
    for count in (1, 3, 7):
        for start in range(0, batch.size, count):
            rows = torch.arange(start, min(start + count, batch.size)).flip(0)
            for view, expected in zip(make(part_of(batch, rows), policy, size, 1, 2), whole):
                assert torch.equal(view, expected[rows])
    for chunk in (1, 3 * size**2, 10**9):
        monkeypatch.setattr(views, "CPU_PIXELS", chunk)
        assert all(torch.equal(a, b) for a, b in zip(make(batch, policy, size, 1, 2), whole))


def test_a_view_has_the_same_bits_on_two_threads() -> None:
    """At a size where torch divides every operation among them."""
    batch = photo_batch(((300, 420), (220, 190), (640, 480)))
    policy = make_policy("v1", grey_p=0.0, blur_p=1.0)
    whole = make_view(batch, sample_params(policy, batch, 0, 0, 0), 224)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for rows in (slice(0, 3), slice(1, 2)):
            part = part_of(batch, rows)
            assert torch.equal(make_view(part, sample_params(policy, part, 0, 0, 0), 224), whole[rows])
    finally:
        torch.set_num_threads(before)


def test_views_differ_by_view_epoch_and_seed() -> None:
    batch = photo_batch(((64, 64),) * 4)
    policy = make_policy("v2")
    drawn = [
        *make_views(batch, policy, 32, 0, 0),
        *make_views(batch, policy, 32, 0, 1),
        *make_views(batch, policy, 32, 1, 0),
    ]
    for a, b in itertools.combinations(drawn, 2):
        assert (a != b).flatten(1).any(1).all()
    again = make_views(batch, policy, 32, 0, 0)
    assert torch.equal(again[0], drawn[0]) and torch.equal(again[1], drawn[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shape_layout_and_type(dtype: torch.dtype, nan_poisoned_empty: None) -> None:
    batch = photo_batch()
    for view in (*make_views(batch, make_policy("small"), 33, 0, 0, dtype), make_eval_view(batch, 32, 36, dtype)):
        assert view.dtype == dtype and view.shape[:2] == (batch.size, 3) and torch.isfinite(view).all()
        assert view.is_contiguous(memory_format=torch.channels_last)
    exact = make_view(batch, sample_params(make_policy("small"), batch, 0, 0, 0), 33)
    assert torch.equal(
        make_view(batch, sample_params(make_policy("small"), batch, 0, 0, 0), 33, dtype), exact.to(dtype)
    )


def test_the_batch_is_not_written_to() -> None:
    batch = photo_batch(((32, 32), (40, 50)))
    before = [t.clone() for t in batch[:-1]]
    params = sample_params(make_policy("small", **EVERYTHING), batch, 0, 0, 0)
    kept = [t.clone() for t in params]
    make_view(batch, params, 32)
    make_eval_view(batch, 32, 32)
    assert all(torch.equal(a, b) for a, b in zip([*batch[:-1], *params], before + kept))


def test_windows_into_larger_storage(make: Callable) -> None:
    """Overlapping and out of order, as in a data set that lies in memory whole."""
    batch = photo_batch(((40, 30), (25, 60), (32, 32)))
    moved = batch._replace(
        pixels=torch.cat([torch.zeros(77, dtype=torch.uint8), batch.pixels]), offset=batch.offset + 77
    )
    rows = torch.tensor([2, 0, 0, 1])
    policy = make_policy("v1")
    for a, b in zip(make(part_of(moved, rows), policy, 32, 0, 0), make(batch, policy, 32, 0, 0)):
        assert torch.equal(a, b[rows])


def test_empty_batch_and_bad_sizes() -> None:
    empty = part_of(photo_batch(((8, 8),)), slice(0, 0))
    assert make_views(empty, make_policy("v2"), 32, 0, 0)[1].shape == (0, 3, 32, 32)
    assert make_eval_view(empty, 32, 32).shape == (0, 3, 32, 32)
    with pytest.raises(ValueError, match="at least 1 pixel, got 0"):
        make_views(empty, make_policy("v2"), 0, 0, 0)
    for dtype in (torch.float64, torch.uint8):
        with pytest.raises(ValueError, match=f"float16, torch.bfloat16, not in {dtype}: convert"):
            make_views(empty, make_policy("v2"), 32, 0, 0, dtype)
    with pytest.raises(ValueError, match="short side of at least 32 pixels, got 30"):
        make_eval_view(empty, 32, 30)


@pytest.mark.parametrize("size", [32, 64])
def test_eval_view_is_torchvisions(size: int) -> None:
    batch = photo_batch(((120, 160), (160, 107), (32, 32), (5, 7)))
    resize = size * 8 // 7
    pipeline = transforms.Compose(
        [
            transforms.Resize(resize),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    expected = torch.stack([pipeline(Image.fromarray(batch.image(i).numpy())) for i in range(batch.size)])
    assert (make_eval_view(batch, size, resize) - expected).abs().max() <= 1.01 / (255 * 0.224)


def test_none_is_the_centre_of_the_image() -> None:
    image = render_photo(32, 48, 0)
    q, k = make_views(pack_images([image], [5], [0]), make_policy("none"), 32, 0, 0)
    assert torch.equal(q, k)
    np.testing.assert_allclose(q[0].numpy(), normalised(image[:, 8:40].astype(float)), atol=1e-5)


def test_hide_and_seek_zeroes_after_normalisation() -> None:
    batch = photo_batch(((64, 64),) * 16)
    plain, hidden = (
        make_view(batch, sample_params(make_policy("v2", hide_and_seek=on), batch, 0, 0, 0), 32) for on in (False, True)
    )
    zero = (hidden == 0).all(dim=1, keepdim=True)
    assert torch.equal(hidden, plain * ~zero)
    share = zero.flatten(1).float().mean(dim=1)
    assert (share == 0).any() and (share > 0.2).any()


def test_preview(tmp_path: Path) -> None:
    batch, policy = photo_batch(), make_policy("small", **EVERYTHING)
    save_preview(part_of(batch, slice(0, 5)), policy, 32, 0, 0, tmp_path / "views.png")
    assert [f.name for f in tmp_path.iterdir()] == ["views.png"]
    with Image.open(tmp_path / "views.png") as picture:
        assert picture.width > picture.height > 700 and len(picture.getcolors(maxcolors=10**7)) > 1000
    p = sample_params(policy, batch, 0, 0, 0)
    for i in range(batch.size):
        words = describe(p, i)
        assert ("flip" in words) == bool(p.flip[i]) and ("blur" in words) == bool(p.blur[i])
        assert ("hue" in words) == bool(p.jitter[i]) and ("hide" in words) == bool(p.hide_cells[i])
        assert max(map(len, _in_two_lines(f"q: {words}").split("\n"))) <= 48  # what fits below a picture
    with pytest.raises(ValueError, match="at least one image"):
        save_preview(part_of(batch, slice(0, 0)), policy, 32, 0, 0, tmp_path / "none.png")


def test_preview_takes_the_bytes_of_its_images_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The resident loader's windows lie in the whole data set, which may not fit into the host's memory."""
    batch, drawn = photo_batch(((8, 9), (7, 5), (6, 8))), []
    monkeypatch.setattr("fastssl.augment.preview.make_view", lambda b, *args: drawn.append(b) or make_view(b, *args))
    some = batch.select(torch.tensor([2, 0]))
    save_preview(some, make_policy("v2"), 8, 0, 0, tmp_path / "views.png")
    assert [len(b.pixels) for b in drawn] == [3 * (8 * 9 + 6 * 8)] * 2
    assert all(torch.equal(b.image(i), some.image(i)) for b in drawn for i in range(2))
    assert all(torch.equal(b.index, some.index) and torch.equal(b.label, some.label) for b in drawn)


def test_preview_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "views.png").write_bytes(b"before")

    def fail(self, fp, **kwargs) -> None:
        Path(fp).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_preview(photo_batch(((8, 8),)), make_policy("v2"), 8, 0, 0, tmp_path / "views.png")
    assert [(f.name, f.read_bytes()) for f in tmp_path.iterdir()] == [("views.png", b"before")]


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the reference on the CPU take the code a GPU takes: batched resize, every operation on every image."""

    def resample_then_flip(images: ImageBatch, p: ViewParams, size: int) -> torch.Tensor:
        x = resample_reference(images, *crop_axes(p, size), size)
        return torch.where(p.flip.view(-1, 1, 1, 1), x.flip(3), x)

    monkeypatch.setattr(views, "crop_resize", resample_then_flip)
    for module in (views, jitter):
        monkeypatch.setattr(module, "apply_where", jitter.apply_everywhere)


def test_operations_on_every_image_leave_the_others_alone(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, policy = photo_batch(), make_policy("small", **EVERYTHING)
    everywhere = make_views(batch, policy, 32, 0, 0, kernel="reference")
    for module in (views, jitter):
        monkeypatch.setattr(module, "apply_where", jitter.apply_chosen)
    for a, b in zip(everywhere, make_views(batch, policy, 32, 0, 0, kernel="reference")):
        assert torch.equal(a, b)


def test_the_code_of_a_gpu_gives_the_bits_of_a_cpu(as_on_a_gpu: None) -> None:
    batch, policy = photo_batch(), make_policy("v2", **EVERYTHING)
    for a, b in zip(*(make_views(batch, policy, 48, 0, 0, kernel=kernel) for kernel in ("auto", "reference"))):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [32, 96])
def test_a_gpu_gives_the_same_bits(size: int) -> None:
    batch, policy = photo_batch(), make_policy("small", **EVERYTHING)
    for cpu, gpu in zip(make_views(batch, policy, size, 0, 0), make_views(batch.to("cuda"), policy, size, 0, 0)):
        assert torch.equal(cpu, gpu.cpu())


@pytest.mark.gpu
def test_a_gpu_never_makes_the_host_wait() -> None:
    batch, policy = photo_batch().to("cuda"), make_policy("small", **EVERYTHING)
    make_views(batch, policy, 32, 0, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        make_views(batch, policy, 32, 0, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("index, label", [([0], [0, 0]), ([0, 1, 2], [0, 0]), ([0, 1], [0])])
def test_each_packed_image_needs_an_index_and_a_label(index: list, label: list) -> None:
    with pytest.raises(ValueError, match="2 images need an index and a label each"):
        pack_images([np.zeros((8, 8, 3), dtype=np.uint8)] * 2, index, label)
