"""Policies and their parameters: what fires how often, in which range, and that nothing but the key matters."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from fastssl.augment.crops import exact_exp
from fastssl.augment.jitter import jitter_order
from fastssl.augment.params import NUM_DRAWS, ViewParams, sample_both, sample_params
from fastssl.augment.policy import CROP_PAIRS, POLICIES, Policy, make_policy, parse_settings
from fastssl.batch import ImageBatch
from fastssl.build import open_policy
from fastssl.config import Config, replace
from fastssl.random_key import uniform

MANY = 20_000


def batch_of(height: int, width: int, count: int = MANY) -> ImageBatch:
    """Windows without pixels: parameters need sizes and indices only."""
    sides = [torch.full((count,), side, dtype=torch.int32) for side in (height, width)]
    index = torch.arange(count)
    return ImageBatch(torch.zeros(0, dtype=torch.uint8), index * 0, *sides, index, index * 0, max(height, width))


def rate_is(mask: torch.Tensor, p: float) -> bool:
    n = mask.numel()
    return abs(float(mask.float().mean()) - p) <= 4.5 * math.sqrt(p * (1 - p) / n)


def is_uniform(values: torch.Tensor, low: float, high: float) -> bool:
    """Kolmogorov-Smirnov distance below its 1e-5 level, and the ends of the range nearly reached."""
    n = values.numel()
    unit = np.sort((values.double().numpy() - low) / (high - low))
    distance = np.abs(unit - (np.arange(n) + 0.5) / n).max() + 0.5 / n
    slack = 5e-4 / (high - low)  # factors are rounded to 2^-13, crops to pixels
    return distance < 2.47 / math.sqrt(n) and -slack <= unit[0] < 0.01 and 0.99 < unit[-1] <= 1 + slack


JITTERED = ("brightness", "contrast", "saturation")


def test_policies_as_published() -> None:
    jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4}
    common = {"crop_scale": (0.2, 1.0), "crop_ratio": (3 / 4, 4 / 3), "flip_p": 0.5, "solarise_p": 0.0}
    expected = {
        "v1": {**common, **jitter, "hue": 0.4, "jitter_p": 1.0, "grey_p": 0.2, "grey_first": True, "blur_p": 0.0},
        "v2": {**common, **jitter, "hue": 0.1, "jitter_p": 0.8, "grey_p": 0.2, "grey_first": False, "blur_p": 0.5},
        "none": {"crop_scale": None, "flip_p": 0.0, "jitter_p": 0.0, "grey_p": 0.0, "blur_p": 0.0, "solarise_p": 0.0},
    }
    for name, fields in expected.items():
        assert dataclasses.asdict(make_policy(name)) | fields == dataclasses.asdict(make_policy(name)), name
    assert make_policy("v2").blur_sigma == (0.1, 2.0)
    assert not any(make_policy(name).hide_and_seek for name in POLICIES)


@pytest.mark.parametrize("cj", [None, 1.0, 1.5, 0.5])
def test_small_policy_scales_with_cj(cj: float | None) -> None:
    c = 1.5 if cj is None else cj
    policy = make_policy("small", cj=cj)
    assert [policy.brightness, policy.contrast, policy.saturation] == pytest.approx([0.8 * c] * 3)
    assert policy.hue == pytest.approx(min(0.5, 0.4 * c))
    assert (policy.jitter_p, policy.grey_p, policy.blur_p, policy.grey_first) == (0.8, 0.5, 0.5, False)


def test_overrides() -> None:
    policy = make_policy("small", grey_scale=0.1, gaussian_blur=0.0, crop_scale=(0.08, 1.0), hue=0.2, cj=1.0)
    assert (policy.grey_p, policy.blur_p, policy.crop_scale, policy.hue) == (0.1, 0.0, (0.08, 1.0), 0.2)
    assert make_policy("v2", solarise_p=0.2, hide_and_seek=True, hide_p=0.7).hide_p == 0.7
    pairs = {"crop_ratio": [0.5, 2.0], "blur_sigma": [0.5, 1.5], "crop_iou": [0.1, 0.3]}
    assert hash(make_policy("v2", **pairs)) == hash(make_policy("v2", **{k: tuple(v) for k, v in pairs.items()}))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("v3", {}, "unknown augmentation policy 'v3'; did you mean 'v"),
        ("smal", {}, "did you mean 'small'"),
        ("imagenet", {}, "choose from none, small, v1, v2"),
        ("v2", {"flipp": 1.0}, "has no setting 'flipp'; did you mean 'flip_p'"),
        ("v2", {"cj": 1.0}, "cj is for the policy 'small'"),
        ("v2", {"grey_scale": 1.5}, r"grey_p is a probability, so it must lie in \[0, 1\], got 1.5"),
        ("small", {"cj": -1.0}, "brightness must lie in"),
        ("v1", {"hue": 0.6}, "hue must lie in"),
        ("v1", {"crop_scale": (0.0, 1.0)}, "crop_scale must be two numbers"),
        ("v1", {"crop_scale": (0.5, 0.2)}, "crop_scale must be two numbers"),
        ("none", {"crop_scale": (0.5, 1.0)}, "crop_scale has no meaning"),
        (
            "v2",
            {"crop_scale": (0.7, 1.0), "crop_iou": (0.05, 0.25)},
            "at least 0.7 .* more than crop_iou's 0.25: lower",
        ),
        ("v2", {"crop_ratio": (2.0, 1.0)}, "crop_ratio must be"),
        ("v2", {"blur_sigma": (0.1, 3.0)}, "blur_sigma must be"),
        ("v2", {"blur_sigma": (1e-46, 2.0)}, "blur_sigma must be two numbers with 0.01 <= low"),
    ],
)
def test_bad_policies(name: str, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_policy(name, **settings)


@pytest.mark.parametrize("change", [{"blur_sigma": (4.0, 5.0)}, {"hue": 2.0}, {"crop_scale": (0.0, 0.0)}])
def test_policies_built_by_hand_are_checked(change: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        Policy("mine", **change)
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(POLICIES["v2"], **change)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("view", [0, 1])
def test_firing_rates_and_ranges(name: str, view: int) -> None:
    policy = make_policy(name, solarise_p=0.2, hide_and_seek=name == "v2", hide_p=0.4)
    p = sample_params(policy, batch_of(375, 500), seed=0, epoch=3, view=view)
    assert rate_is(p.flip, policy.flip_p) and rate_is(p.jitter, policy.jitter_p)
    assert rate_is(p.blur, policy.blur_p) and rate_is(p.solarise, 0.2)
    assert rate_is(p.grey_before, policy.grey_p * policy.grey_first)
    assert rate_is(p.grey_after, policy.grey_p * (not policy.grey_first))
    for factor in JITTERED:
        strength, values = getattr(policy, factor), getattr(p, factor)
        assert torch.equal(values * 8192, (values * 8192).round())
        if strength:
            assert is_uniform(values, max(0, 1 - strength), 1 + strength)
        else:
            assert (values == 1).all()
    assert is_uniform(p.hue, -policy.hue, policy.hue) if policy.hue else (p.hue == 0).all()
    assert is_uniform(p.sigma, 0.1, 2.0)
    counts = torch.bincount(p.order, minlength=24).double()
    assert counts.numel() == 24 and (counts - MANY / 24).abs().max() < 4.5 * (MANY / 24) ** 0.5
    for cells in (0, 16, 8, 4):
        assert rate_is(p.hide_cells == cells, 0.25 if name == "v2" else float(cells == 0))
    assert (p.hide_p == torch.tensor(0.4)).all() and is_uniform(p.hide_key.double(), 0, 2**24)


def test_hue_turns_both_ways_equally() -> None:
    hue = sample_params(make_policy("v2"), batch_of(64, 64), 1, 0, 0).hue
    assert rate_is(hue > 0, 0.5) and abs(float(hue.mean())) < 0.003 and hue.min() < -0.0995 and hue.max() > 0.0995


def test_parameters_are_independent() -> None:
    policy = make_policy("v2", solarise_p=0.5, hide_and_seek=True)
    views = [sample_params(policy, batch_of(375, 500), 0, 0, view) for view in (0, 1)]
    columns = [t.double() for p in views for n, t in p._asdict().items() if n not in ("grey_before", "hide_p")]
    skip = {ViewParams._fields.index(n) for n in ("top", "left", "crop_height", "crop_width")}  # these four do depend
    correlation = np.corrcoef(torch.stack(columns).numpy()) - np.eye(len(columns))
    half = len(columns) // 2
    for a, b in itertools.combinations(range(len(columns)), 2):
        if not (a % half in skip and b % half in skip and a // half == b // half):
            assert abs(correlation[a, b]) < 5 / MANY**0.5, (a, b)


def test_parameters_differ_within_a_batch() -> None:
    p = sample_params(make_policy("small"), batch_of(375, 500, 64), 0, 0, 0)
    for values in (p.top, p.crop_width, p.brightness, p.contrast, p.saturation, p.hue, p.sigma):
        assert values.unique().numel() > 32
    assert p.order.unique().numel() > 12


def torchvision_box(height: int, width: int, u: list[float], scale: tuple, ratio: tuple) -> tuple[int, int, int, int]:
    """RandomResizedCrop.get_params in Python floats, fed with our uniforms."""
    for t in range(10):
        area = height * width * (scale[0] + u[t] * (scale[1] - scale[0]))
        aspect = math.exp(math.log(ratio[0]) + u[10 + t] * (math.log(ratio[1]) - math.log(ratio[0])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(u[20] * (height - h + 1)), int(u[21] * (width - w + 1)), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (32, 32), (1, 1), (1, 5000), (5000, 1), (7, 3), (200, 201)])
def test_crop_boxes_are_torchvisions(size: tuple[int, int]) -> None:
    batch = batch_of(*size, count=300)
    p = sample_params(make_policy("v2"), batch, 7, 1, 0)
    u = uniform(7, 1, batch.index, 0, NUM_DRAWS).double().tolist()
    expected = [torchvision_box(*size, row, (0.2, 1.0), (3 / 4, 4 / 3)) for row in u]
    assert torch.stack([p.top, p.left, p.crop_height, p.crop_width], 1).tolist() == [list(box) for box in expected]


@pytest.mark.parametrize("size", [(375, 500), (30, 40), (1, 1), (64, 64)])
@pytest.mark.parametrize("settings", [{}, {"crop_scale": (0.9, 1.0)}, {"crop_ratio": (0.01, 100.0)}])
def test_boxes_lie_inside_and_touch_every_border(size: tuple[int, int], settings: dict) -> None:
    p = sample_params(make_policy("v2", **settings), batch_of(*size), 0, 0, 1)
    bottom, right = p.top + p.crop_height, p.left + p.crop_width
    assert p.crop_height.min() >= 1 and p.crop_width.min() >= 1
    assert p.top.min() == 0 and p.left.min() == 0 and bottom.max() == size[0] and right.max() == size[1]


def test_crop_area_and_ratio_are_uniform() -> None:
    p = sample_params(make_policy("v2", crop_scale=(0.2, 0.5)), batch_of(4000, 4000), 0, 0, 0)
    area = p.crop_height.double() * p.crop_width / 4000**2
    assert is_uniform(area, 0.2, 0.5)
    assert is_uniform((p.crop_width.double() / p.crop_height).log(), math.log(3 / 4), math.log(4 / 3))


def test_none_takes_the_central_square() -> None:
    p = sample_params(make_policy("none"), batch_of(375, 500, 5), 0, 0, 0)
    assert torch.stack([p.top, p.left, p.crop_height, p.crop_width], 1).unique(dim=0).tolist() == [[0, 62, 375, 375]]


@pytest.mark.parametrize("name", POLICIES)
def test_parameters_do_not_depend_on_the_batch(name: str) -> None:
    policy = make_policy(name, hide_and_seek=True)
    random = np.random.default_rng(0)
    whole = batch_of(1, 1, 37)
    sides = [torch.from_numpy(random.integers(1, 600, 37).astype(np.int32)) for _ in range(2)]
    whole = whole._replace(height=sides[0], width=sides[1], index=torch.from_numpy(random.integers(0, 2**40, 37)))
    all_params = sample_params(policy, whole, 5, 6, 1)
    for part in (slice(0, 1), slice(3, 8), slice(8, 37), torch.tensor([36, 2, 2, 30])):
        batch = whole.select(part)
        for field, some, expected in zip(ViewParams._fields, sample_params(policy, batch, 5, 6, 1), all_params):
            assert torch.equal(some, expected[part]) and some.dtype == expected.dtype, field


def test_order_numbers_are_the_permutations() -> None:
    orders = jitter_order(torch.arange(24, dtype=torch.int32))
    assert [tuple(row) for row in orders.tolist()] == list(itertools.permutations(range(4)))


def test_exact_exp() -> None:
    x = torch.linspace(-16, 16, 4001, dtype=torch.float64)
    np.testing.assert_allclose(exact_exp(x).numpy(), np.exp(x.numpy()), rtol=1e-13)
    assert torch.equal(torch.cat([exact_exp(part) for part in x.split(3)]), exact_exp(x))


def test_policies_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Policy("mine").flip_p = 1.0


@pytest.mark.gpu
@pytest.mark.parametrize("name", POLICIES)
def test_parameters_have_the_same_bits_on_a_gpu(name: str) -> None:
    policy = make_policy(name, hide_and_seek=True)
    batch = batch_of(375, 500, 3000)
    for field, cpu, gpu in zip(
        ViewParams._fields, sample_params(policy, batch, 1, 2, 0), sample_params(policy, batch.to("cuda"), 1, 2, 0)
    ):
        assert torch.equal(cpu, gpu.cpu()), field


@pytest.mark.parametrize("name", ["easy", "hard", "super-hard"])
@pytest.mark.parametrize("sides", [(375, 500), (40, 30)])
@pytest.mark.parametrize("smallest", [0.08, 0.2])
def test_crop_pairs_overlap_within_bounds_and_are_not_nested(name: str, sides: tuple, smallest: float) -> None:
    low, high = CROP_PAIRS[name]
    batch = batch_of(*sides, count=2000)
    p = sample_both(make_policy("v2", crop_iou=(low, high), crop_scale=(smallest, 1.0)), batch, 0, 0)
    iou, nested = overlap(*p)
    fits = (iou >= low) & (iou <= high) & ~nested
    assert fits.float().mean() > 0.99 and not nested.any()
    assert ((iou > 0.8 * low - 1e-4) & (iou < high + 0.02)).all()  # the others are near
    for view in p:
        assert (view.top >= 0).all() and (view.top + view.crop_height <= sides[0]).all()
        assert (view.left >= 0).all() and (view.left + view.crop_width <= sides[1]).all()


@pytest.mark.parametrize("name", ["easy", "hard"])
def test_crop_pairs_of_long_images(name: str) -> None:
    """Where two places drawn at random share nothing, they must come nearer to each other."""
    low, high = CROP_PAIRS[name]
    iou, nested = overlap(*sample_both(make_policy("v2", crop_iou=(low, high)), batch_of(50, 500, count=2000), 0, 0))
    assert ((iou >= low) & (iou <= high) & ~nested).float().mean() > 0.99


def overlap(q: ViewParams, k: ViewParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel by pixel, for pictures of at most 500 pixels a side: IoU of the crops, and is one inside the other?"""
    shared = torch.ones(len(q.top), dtype=torch.int64)
    for start, length in (("top", "crop_height"), ("left", "crop_width")):
        pixel = torch.arange(512)
        inside = [
            (getattr(p, start)[:, None] <= pixel) & (pixel < (getattr(p, start) + getattr(p, length))[:, None])
            for p in (q, k)
        ]
        shared = shared * (inside[0] & inside[1]).sum(1)
    areas = [p.crop_height.long() * p.crop_width for p in (q, k)]
    return shared / (areas[0] + areas[1] - shared), (shared == areas[0]) | (shared == areas[1])


def test_crop_pairs_mix_with_plain_crops() -> None:
    batch = batch_of(200, 300)
    plain = sample_both(make_policy("v2"), batch, 0, 0)
    mixed = sample_both(make_policy("v2", crop_iou=(0.05, 0.25), crop_iou_p=0.5), batch, 0, 0)
    same = [(a.crop_width == b.crop_width) & (a.left == b.left) & (a.top == b.top) for a, b in zip(plain, mixed)]
    assert rate_is(same[0] & same[1], 0.5)
    for field in set(ViewParams._fields) - {"top", "left", "crop_height", "crop_width"}:
        assert all(torch.equal(getattr(a, field), getattr(b, field)) for a, b in zip(plain, mixed))


def test_both_views_together_are_the_views_one_by_one() -> None:
    batch = batch_of(60, 80, count=50)
    for policy in (make_policy("small", hide_and_seek=True), make_policy("v1", crop_iou=(0.05, 0.25))):
        for view, together in enumerate(sample_both(policy, batch, 3, 4)):
            alone = sample_params(policy, batch, 3, 4, view)
            assert all(torch.equal(a, b) for a, b in zip(alone, together))
    part = batch.select(torch.tensor([7, 3]))
    assert torch.equal(sample_both(policy, part, 3, 4)[1].left, together.left[[7, 3]])


def test_settings_in_words() -> None:
    words = ("solarise_p=0.2", "blur_sigma=0.5,1.5", "grey_first=true", "crop_iou=0.1,0.3")
    expected = {"solarise_p": 0.2, "blur_sigma": (0.5, 1.5), "grey_first": True, "crop_iou": (0.1, 0.3)}
    assert parse_settings(words) == expected
    assert make_policy("v2", **parse_settings(words)).crop_iou == (0.1, 0.3)


def test_every_setting_can_be_given_in_words() -> None:
    """Also those that have a flag of their own."""
    for field in dataclasses.fields(Policy):
        if field.name != "name":
            value = {bool: True, float: 0.25}.get(type(field.default), (0.5, 0.75))
            word = str(value).strip("()").replace(" ", "").lower()
            config = replace(Config(), policy="v2", policy_set=(f"{field.name}={word}",))
            assert getattr(open_policy(config), field.name) == value


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("solarize_p=0.2", "there is no 'solarize_p'; did you mean 'solarise_p'"),
        ("hue", "hue takes a number, such as 0.2"),
        ("hue=0.1,0.2", "hue takes a number"),
        ("blur_sigma=1", "blur_sigma takes two numbers separated by a comma"),
        ("grey_first=1", "grey_first takes true or false"),
        ("name=v3", "there is no 'name'"),
    ],
)
def test_bad_settings_in_words(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_settings([word])
