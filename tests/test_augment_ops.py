"""Every operation against Pillow and torchvision, or against float64 where Pillow only approximates."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as reference
from photos import SIZES, photo_batch, pixels, planes, render_photo
from PIL import Image, ImageOps

from fastssl.augment.blur import gaussian_taps, update_blur
from fastssl.augment.color import (
    update_brightness,
    update_contrast,
    update_greyscale,
    update_hue,
    update_saturation,
    update_solarise,
)
from fastssl.augment.hide import update_hide
from fastssl.augment.params import ViewParams, sample_params
from fastssl.augment.policy import make_policy
from fastssl.augment.resample import crop_axes, eval_axes, resample_reference
from fastssl.augment.resize import crop_resize, eval_resize
from fastssl.batch import pack_images

PHOTOS = [render_photo(96, 96, seed, grey=seed == 3) for seed in range(4)]
BLENDS = {
    "brightness": (update_brightness, reference.adjust_brightness),
    "contrast": (update_contrast, reference.adjust_contrast),
    "saturation": (update_saturation, reference.adjust_saturation),
}


def updated(update, image: np.ndarray, *params: float) -> np.ndarray:
    x = planes(image)
    update(x, *(torch.tensor([p]) for p in params))
    return pixels(x)


def many_colours() -> np.ndarray:
    """90,000 random colours and the corners of the cube, as one image."""
    colours = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    colours[0, :8] = [[255 * (i >> c & 1) for c in range(3)] for i in range(8)]
    return colours


@pytest.mark.parametrize("name", BLENDS)
@pytest.mark.parametrize("photo", PHOTOS)
def test_blends_equal_pillow(name: str, photo: np.ndarray) -> None:
    ours, pillows = BLENDS[name]
    for step in range(0, 4 * 8192, 1999):  # factors as drawn: multiples of 2^-13
        factor = step / 8192
        np.testing.assert_array_equal(updated(ours, photo, factor), pillows(Image.fromarray(photo), factor))


@pytest.mark.parametrize("name", BLENDS)
def test_blends_by_any_factor_are_within_one(name: str) -> None:
    ours, pillows = BLENDS[name]
    for factor in (0.0, 0.1, 0.3, 1 / 3, 0.9, 1.0, 1.1, 1.3, 1.7, 2.2):
        error = np.abs(updated(ours, PHOTOS[0], factor) - np.asarray(pillows(Image.fromarray(PHOTOS[0]), factor)))
        assert error.max() <= 1 and error.mean() < 0.1


def test_contrast_turns_on_the_rounded_mean_of_the_image() -> None:
    """The mean luma of this image is 100.5, which Pillow rounds up; factor 0 leaves the mean alone."""
    image = np.full((2, 2, 3), 100, dtype=np.uint8)
    image[0] = 101
    assert (updated(update_contrast, image, 0.0) == 101).all()
    image[0, 0] = 100
    assert (updated(update_contrast, image, 0.0) == 100).all()


@pytest.mark.parametrize("photo", [*PHOTOS, many_colours()])
def test_greyscale_and_solarise_equal_pillow(photo: np.ndarray) -> None:
    image = Image.fromarray(photo)
    np.testing.assert_array_equal(updated(update_greyscale, photo), reference.to_grayscale(image, 3))
    np.testing.assert_array_equal(updated(update_solarise, photo), ImageOps.solarize(image))


def hue_and_chroma(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hue in 1/255 of the circle, and max - min, in float64."""
    r, g, b = np.moveaxis(image.astype(np.float64), -1, 0)
    high, chroma = image.max(-1), image.max(-1).astype(np.float64) - image.min(-1)
    c = np.maximum(chroma, 1)
    sector = np.where(high == r, (g - b) / c, np.where(high == g, 2 + (b - r) / c, 4 + (r - g) / c))
    return (sector % 6) * 42.5, chroma


@pytest.mark.parametrize("turns", [-0.5, -0.37, -0.1, -0.013, -0.003, 0.003, 0.02, 0.1, 0.25, 0.4, 0.5])
def test_hue_equals_pillow_but_for_one_level_of_few_colours(turns: float) -> None:
    colours = many_colours()
    ours = updated(update_hue, colours, turns)
    pillows = np.asarray(reference.adjust_hue(Image.fromarray(colours), turns)).astype(np.int64)
    error = np.abs(ours - pillows).max(axis=-1)
    assert (error > 0).mean() < 0.005 and error.max() <= 6  # one hue level of 255 moves a channel by up to 6
    (hue, chroma), (hue_pillow, _) = hue_and_chroma(ours), hue_and_chroma(pillows)
    apart = np.abs(hue - hue_pillow)
    assert np.minimum(apart, 255 - apart)[chroma > 100].max() <= 2


@pytest.mark.parametrize("turns", [-0.3, -0.1, 0.1, 0.3])
def test_hue_turns_by_the_angle_asked_for(turns: float) -> None:
    """Against the true angle, so that an error shared with Pillow would show: both its roundings are below 2 levels."""
    colours = many_colours()
    (before, chroma), (after, _) = hue_and_chroma(colours), hue_and_chroma(updated(update_hue, colours, turns))
    turned = (after - before - turns * 255 + 127.5) % 255 - 127.5
    assert np.abs(turned[chroma > 150]).max() <= 2.8  # and rounding to bytes adds 0.3 at this chroma
    assert updated(update_hue, colours, turns).max(-1).tolist() == colours.max(-1).tolist()  # the value stays


def true_gaussian(image: np.ndarray, sigma: float) -> np.ndarray:
    """Float64, 12 sigma wide, edges repeated."""
    radius = max(1, math.ceil(12 * sigma))
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    taps /= taps.sum()
    x = np.pad(image.astype(np.float64), ((radius, radius), (radius, radius), (0, 0)), mode="edge")
    for axis in (0, 1):
        x = np.apply_along_axis(np.convolve, axis, x, taps, mode="valid")
    return x


@pytest.mark.parametrize("sigma", [0.1, 0.24, 0.26, 0.4, 0.7, 1.0, 1.3, 1.6, 2.0])
@pytest.mark.parametrize("size", [1, 5, 48])
def test_blur_is_a_true_gaussian(sigma: float, size: int) -> None:
    hard_edges = np.random.default_rng(0).choice(np.array([0, 255], dtype=np.uint8), (size, size, 3))
    for image in (render_photo(size, size, 1), hard_edges):
        x, taps = planes(image), gaussian_taps(torch.tensor([sigma]))
        update_blur(x, taps)
        error = np.abs(pixels(x) - true_gaussian(image, sigma))
        assert error.max() <= 0.9 and error.mean() <= 0.3  # half of it is the rounding to bytes


def test_blur_taps_sum_to_one_exactly_and_are_exact() -> None:
    taps = gaussian_taps(torch.linspace(0.1, 2.0, 200)).double()
    assert torch.equal(taps[:, 0] + 2 * taps[:, 1:].sum(1), torch.ones(200, dtype=torch.float64))
    assert torch.equal(taps * 2**14, (taps * 2**14).round()) and taps.min() >= 0


def test_each_image_has_its_own_parameters() -> None:
    """A batch of four equals four batches of one: factors, turns and sigmas are not shared."""
    x = torch.cat([planes(photo) for photo in PHOTOS])
    factors, turns = torch.tensor([0.25, 0.75, 1.25, 1.75]), torch.tensor([-0.4, -0.1, 0.2, 0.45])
    taps = gaussian_taps(torch.tensor([0.1, 0.7, 1.4, 2.0]))
    for update, values in ((update_brightness, factors), (update_contrast, factors), (update_saturation, factors)):
        assert_alone_as_together(x, update, values)
    assert_alone_as_together(x, update_hue, turns)
    assert_alone_as_together(x, update_blur, taps)


def assert_alone_as_together(x: torch.Tensor, update, values: torch.Tensor) -> None:
    together = x.clone()
    update(together, values)
    for i in range(len(x)):
        alone = x[i : i + 1].clone()
        update(alone, values[i : i + 1])
        assert torch.equal(alone[0], together[i])


def test_hide_and_seek_hides_whole_cells_at_its_probability() -> None:
    size, count = 64, 400
    cells = torch.tensor([16, 8, 4, 16]).repeat(count // 4).int()
    probability = torch.tensor([0.5, 0.5, 0.5, 0.125]).repeat(count // 4)
    x = torch.ones(count, 3, size, size)
    update_hide(x, cells, probability, torch.arange(count) * 31)
    assert ((x == 0) | (x == 1)).all() and torch.equal(x[:, 0], x[:, 1]) and torch.equal(x[:, 0], x[:, 2])
    for kind, (n, p) in enumerate([(16, 0.5), (8, 0.5), (4, 0.5), (16, 0.125)]):
        blocks = x[kind::4, 0].unflatten(2, (n, -1)).unflatten(1, (n, -1)).transpose(2, 3).flatten(3)
        assert torch.equal(blocks.amin(3), blocks.amax(3))
        hidden = 1 - blocks[..., 0]
        assert abs(float(hidden.mean()) - p) < 4.5 * math.sqrt(p * (1 - p) / hidden.numel())
        assert hidden.flatten(1).unique(dim=0).shape[0] > 95  # each image its own


def crops_of(batch, boxes: list[tuple[int, int, int, int]]) -> ViewParams:
    params = sample_params(make_policy("none"), batch, 0, 0, 0)
    top, left, height, width = (torch.tensor(side, dtype=torch.int32) for side in zip(*boxes))
    return params._replace(top=top, left=left, crop_height=height, crop_width=width)


@pytest.mark.parametrize("size", [1, 32, 75, 224])
def test_crops_match_pillow(size: int) -> None:
    batch = photo_batch()
    whole = [(0, 0, h, w) for h, w in SIZES]
    corner = [(0, 0, max(1, h // 2), max(1, w // 3)) for h, w in SIZES]
    far = [(h - max(1, h // 3), w - max(1, w // 2), max(1, h // 3), max(1, w // 2)) for h, w in SIZES]
    inside = [(h // 4, w // 5, max(1, h // 2), max(1, w // 2)) for h, w in SIZES]
    for boxes in (whole, corner, far, inside):
        params = crops_of(batch, boxes)
        ours = crop_resize(batch, params, size)
        exact = resample_reference(batch, *crop_axes(params, size), size)
        for i, (top, left, height, width) in enumerate(boxes):
            window = Image.fromarray(batch.image(i).numpy()).crop((left, top, left + width, top + height))
            pillows = np.asarray(window.resize((size, size), Image.Resampling.BILINEAR)).astype(np.int64)
            for view in (ours[i], exact[i]):
                error = np.abs(view.permute(1, 2, 0).numpy() - pillows)
                assert error.max() <= 1 and error.mean() <= 0.3


@pytest.mark.parametrize("side", [64, 100, 128])
def test_enlarged_crops_are_within_one_of_pillow(side: int) -> None:
    """Where torch's own resize of bytes is 2 away, in about 24 values of a million."""
    batch = photo_batch(((side, side),) * 4)
    ours = crop_resize(batch, crops_of(batch, [(0, 0, side, side)] * 4), 224).permute(0, 2, 3, 1).numpy()
    for i in range(4):
        pillows = Image.fromarray(batch.image(i).numpy()).resize((224, 224), Image.Resampling.BILINEAR)
        assert np.abs(ours[i].astype(int) - np.asarray(pillows)).max() <= 1


def test_the_bound_on_sides_does_not_change_a_resize() -> None:
    batch = photo_batch(((40, 60), (33, 20)))
    axes = crop_axes(sample_params(make_policy("v2"), batch, 0, 0, 0), 24)
    assert batch.max_side == 60
    looser = batch._replace(max_side=1 << 40)  # as in a data set with a far larger image: costs a CPU no memory
    assert torch.equal(resample_reference(batch, *axes, 24), resample_reference(looser, *axes, 24))


def test_crops_of_huge_images() -> None:
    image = np.random.default_rng(0).integers(0, 256, (3000, 3000, 3), dtype=np.uint8)
    image[:1500] //= 4
    batch = pack_images([image], [0], [0])
    ours = crop_resize(batch, crops_of(batch, [(3, 1, 2990, 2999)]), 32)[0].permute(1, 2, 0).numpy()
    pillows = np.asarray(Image.fromarray(image[3:2993, 1:]).resize((32, 32), Image.Resampling.BILINEAR))
    assert np.abs(ours.astype(int) - pillows).max() <= 1


@pytest.mark.parametrize(("size", "resize"), [(32, 32), (32, 37), (64, 73), (224, 256)])
def test_eval_views_match_torchvision(size: int, resize: int) -> None:
    sizes = tuple(s for s in SIZES if max(s) / min(s) < 20)
    batch = photo_batch(sizes)
    ours = eval_resize(batch, size, resize)
    exact = resample_reference(batch, *eval_axes(batch, size, resize), size)
    for i in range(len(sizes)):
        expected = reference.center_crop(reference.resize(Image.fromarray(batch.image(i).numpy()), resize), size)
        for view in (ours[i], exact[i]):
            error = np.abs(view.permute(1, 2, 0).numpy() - np.asarray(expected).astype(np.int64))
            assert error.max() <= 1 and error.mean() <= 0.3


def test_eval_views_of_needles_stay_small() -> None:
    """torchvision would make a picture of 32 x 160,000 of this; only its centre is computed."""
    batch = photo_batch(((1, 5000), (5000, 1)))
    views = eval_resize(batch, 32, 32)
    exact = resample_reference(batch, *eval_axes(batch, 32, 32), 32)
    assert (views.int() - exact.int()).abs().max() <= 1
    middle = batch.image(0)[0, 2500].int()
    assert (views[0, :, 16, 31].int() - middle).abs().max() <= (batch.image(0)[0, 2499].int() - middle).abs().max()
