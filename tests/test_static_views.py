"""Static view sets: names, geometry read back from the pixels, statistics, resuming, every refusal."""

import argparse
import errno
import os

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.command import run_command
from fastssl.data_prep import static_views, view_pairs
from fastssl.data_prep.static_views import make_static_views
from fastssl.data_prep.view_pairs import (
    AUGS,
    MEAN_COLOUR,
    Box,
    contains,
    count_views,
    intersection_over_union,
    make_view_pair,
    shared_region,
)
from fastssl.distributed import Ranks
from fastssl.eval.view_set import open_view_set

WIDTH, HEIGHT = 250, 200


@pytest.fixture
def coordinates(monkeypatch):
    """An image whose red is x and whose green is y, with the colour operations switched off."""
    monkeypatch.setattr(view_pairs, "_recolour", lambda view: view)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return Image.fromarray(np.stack([x, y, np.full_like(x, 7)], 2).astype(np.uint8))


def extent(view):
    """Crop (top, left, bottom, right) a view of the coordinates image shows, from its corners' colours."""
    a = np.asarray(view).astype(float)
    x, y = sorted([a[112, 0, 0], a[112, -1, 0]]), sorted([a[0, 112, 1], a[-1, 112, 1]])
    return y[0], x[0], y[1] + 1, x[1] + 1


def is_flipped(view):
    a = np.asarray(view).astype(int)
    return a[112, 0, 0] > a[112, -1, 0]


def files(folder):
    return {os.path.relpath(os.path.join(d, n), folder) for d, _, names in os.walk(folder) for n in names}


@pytest.mark.parametrize("aug", AUGS)
def test_names_sizes_and_number_of_views(aug, image_folder, tmp_path):
    notes = make_static_views(str(image_folder / "train"), str(tmp_path / "set"), aug, 2, workers=1)
    assert count_views(aug) == (2 if aug in ("moco", "nointer") else 10)
    expected = {f"class{c}/{i}-{n}.jpeg" for c in range(3) for i in range(2) for n in range(count_views(aug) + 1)}
    assert files(tmp_path / "set") == expected and not [n for n in notes if "band" not in n]
    with (
        Image.open(tmp_path / "set/class1/1-0.jpeg") as image,
        Image.open(image_folder / "train/class1/1.jpg") as source,
    ):
        assert image.size == source.size and image.format == "JPEG"
    for n in range(1, count_views(aug) + 1):
        with Image.open(tmp_path / f"set/class1/1-{n}.jpeg") as image:
            assert image.size == (224, 224)


def test_workers_and_order_change_nothing_and_the_seed_does(image_folder, tmp_path):
    for name, options in {"a": {"workers": 1}, "b": {"workers": 2}, "c": {"workers": 1, "seed": 1}}.items():
        make_static_views(str(image_folder / "train"), str(tmp_path / name), "hard", 2, **options)
    bytes_of = {n: {f: (tmp_path / n / f).read_bytes() for f in files(tmp_path / n)} for n in "abc"}
    assert bytes_of["a"] == bytes_of["b"]
    assert all((bytes_of["a"][f] == bytes_of["c"][f]) == f.endswith("-0.jpeg") for f in bytes_of["a"])


def test_a_set_that_was_cut_short_is_finished(image_folder, tmp_path):
    arguments = (str(image_folder / "train"), str(tmp_path / "set"), "moco", 3)
    make_static_views(*arguments, workers=1)
    before = {f: (tmp_path / "set" / f).read_bytes() for f in files(tmp_path / "set")}
    kept = tmp_path / "set/class0/0-2.jpeg"
    stamp = kept.stat().st_mtime_ns
    (tmp_path / "set/class2/1-2.jpeg").unlink()
    (tmp_path / "set/class2/1-1.jpeg").write_bytes(b"torn")
    make_static_views(*arguments, workers=1)
    assert {f: (tmp_path / "set" / f).read_bytes() for f in files(tmp_path / "set")} == before
    assert kept.stat().st_mtime_ns == stamp


def test_moco_views_are_crops_of_the_stated_share(coordinates):
    shares, flips = [], 0
    for seed in range(200):
        views, in_band = make_view_pair(coordinates, "moco", seed)
        for view in views:
            top, left, bottom, right = extent(view)
            shares.append((bottom - top) * (right - left) / (WIDTH * HEIGHT))
            flips += is_flipped(view)
    assert in_band and 0.17 < min(shares) < 0.25 and 0.9 < max(shares) <= 1
    assert 0.4 < flips / 400 < 0.6


def test_nointer_views_lie_in_different_quadrants(coordinates):
    pairs = set()
    for seed in range(40):
        quadrants = []
        for view in make_view_pair(coordinates, "nointer", seed)[0]:
            top, left, bottom, right = extent(view)
            assert bottom <= HEIGHT / 2 + 1 or top >= HEIGHT / 2 - 1
            assert right <= WIDTH / 2 + 1 or left >= WIDTH / 2 - 1
            quadrants.append((top >= HEIGHT / 2 - 1, left >= WIDTH / 2 - 1))
        assert quadrants[0] != quadrants[1]
        pairs.add(tuple(quadrants))
    assert len(pairs) == 12  # all ordered pairs of four


@pytest.mark.parametrize("aug, low, high", [("super-hard", 0, 0.05), ("hard", 0.05, 0.25), ("easy", 0.25, 1)])
def test_banded_views_overlap_as_much_as_they_should(coordinates, aug, low, high):
    found = 0
    for seed in range(12):
        views, in_band = make_view_pair(coordinates, aug, seed)
        assert len(views) == 10
        if not in_band:  # crops of at least a fifth of the image are seldom almost disjoint
            continue
        found += 1
        a, b = extent(views[0]), extent(views[1])
        height, width = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        overlap = max(height, 0) * max(width, 0)
        union = sum((e[2] - e[0]) * (e[3] - e[1]) for e in (a, b)) - overlap
        assert low - 0.02 <= overlap / union <= high + 0.02  # read back from 8-bit colours
        assert overlap > 0 or aug == "super-hard"  # where a shared edge counts as a pixel
    assert found >= 6 if aug == "super-hard" else found == 12


@pytest.mark.parametrize("seed", range(6))
def test_masks_cover_what_the_views_share_and_their_controls_do_not(coordinates, seed):
    views = [np.asarray(v).astype(int) for v in make_view_pair(coordinates, "hard", seed)[0]]
    for side, other in ((0, 1), (1, 0)):
        view, noisy, noise_control, mean, mean_control = views[side::2]
        top, left, bottom, right = extent(Image.fromarray(views[other].astype(np.uint8)))
        covered = (mean == MEAN_COLOUR).all(2)
        seen = (
            (view[..., 0] > left + 2)
            & (view[..., 0] < right - 3)
            & (view[..., 1] > top + 2)
            & (view[..., 1] < bottom - 3)
        )
        far = (
            (view[..., 0] < left - 3)
            | (view[..., 0] > right + 3)
            | (view[..., 1] < top - 3)
            | (view[..., 1] > bottom + 3)
        )
        seen[:2] = seen[-2:] = seen[:, :2] = seen[:, -2:] = False  # the mask's size is rounded down
        assert covered[seen].all() and not covered[far].any() and covered.any()
        assert np.array_equal(mean[~covered], view[~covered]) and np.array_equal(noisy[~covered], view[~covered])
        assert (noisy[covered] != view[covered]).any(1).mean() > 0.9 and noisy[covered].std() > 60
        elsewhere = (mean_control == MEAN_COLOUR).all(2)
        assert covered.sum() <= elsewhere.sum() <= 1.05 * covered.sum()  # at the border a mask may lose a pixel
        assert np.array_equal(mean_control[~elsewhere], view[~elsewhere])
        changed = (noise_control != view).any(2)
        assert 0.9 * covered.sum() <= changed.sum() <= elsewhere.sum()


def test_overlap_is_counted_as_the_project_counts_it():
    a, b = Box(0, 0, 10, 10), Box(5, 5, 10, 10)
    assert intersection_over_union(a, b) == 36 / (200 - 36)
    assert intersection_over_union(a, Box(20, 0, 5, 5)) == 0
    assert intersection_over_union(Box(0, 0, 3, 2), Box(0, 0, 3, 2)) > 1  # no union is left
    assert contains(a, Box(0, 0, 10, 3)) and not contains(a, b)
    assert shared_region(a, Box(30, 30, 5, 5)) is None
    assert shared_region(a, b) == Box(112, 112, int(6 / 11 * 224), int(6 / 11 * 224))


def test_colours_change_as_often_as_they_should():
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    grey = sum(
        (np.ptp(np.asarray(v), axis=2) == 0).all() for s in range(150) for v in make_view_pair(image, "moco", s)[0]
    )
    assert abs(grey / 300 - 0.2) < 0.08  # 3.5 standard deviations


def test_bad_images_are_named_and_the_next_ones_taken(make_image_folder, tmp_path):
    data = make_image_folder(tmp_path / "data", {"train": 4}, classes=2) / "train"
    (data / "class1/0.jpg").write_bytes(b"not an image")
    (data / "class1/1.jpg").write_bytes((data / "class1/1.jpg").read_bytes()[:200])
    (data / "class1/0.heic").touch()
    kinds, *notes = make_static_views(str(data), str(tmp_path / "set"), "moco", 2, workers=1)
    assert "(.heic 1)" in kinds
    assert len(notes) == 2 and all("left out: " in n for n in notes) and "class1/0.jpg" in notes[0]
    assert {f for f in files(tmp_path / "set") if f.endswith("-0.jpeg")} == {
        "class0/0-0.jpeg", "class0/1-0.jpeg", "class1/2-0.jpeg", "class1/3-0.jpeg",
    }  # fmt: skip


def test_crops_that_cannot_be_had_are_counted(monkeypatch):
    monkeypatch.setitem(view_pairs.BANDS, "easy", (2.0, 3.0, 5))
    views, in_band = make_view_pair(Image.new("RGB", (64, 64)), "easy", 0)
    assert not in_band and len(views) == 10


@pytest.mark.parametrize("greyscale", [True, False])
def test_images_of_other_kinds(tmp_path, greyscale):
    (tmp_path / "data/a").mkdir(parents=True)
    Image.new("L" if greyscale else "RGBA", (40, 30), 90).save(tmp_path / "data/a/picture.v2.png")
    make_static_views(str(tmp_path / "data"), str(tmp_path / "set"), "moco", 1, workers=1)
    with Image.open(tmp_path / "set/a/picture-0.jpeg") as image:
        assert image.mode == "RGB"


def test_the_set_of_odd_names_is_read_again(tmp_path):
    for name in ("two\nlines", "☃", "-x"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / name / "a b.png")
    assert make_static_views(str(tmp_path / "data"), str(tmp_path / "set"), "moco", 1, workers=1) == []
    found = open_view_set(argparse.Namespace(data=tmp_path / "set", workers=1), Ranks(0, 1, torch.device("cpu")))
    assert found.class_names == ["-x", "two\nlines", "☃"] and found.files.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_a_full_disk_is_named_and_leaves_no_part_of_a_file(image_folder, tmp_path, monkeypatch, capsys):
    save = Image.Image.save

    def run_out(image, path, **options):
        save(image, path, **options)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", run_out)
    data, out = str(image_folder / "train"), str(tmp_path / "set")
    assert run_command(static_views.main, [data, out, "--workers", "1"]) == 1
    assert capsys.readouterr().err == f"fastssl: error: {out}/class0: No space left on device\n"
    assert files(tmp_path / "set") == set()


def test_the_current_folder_can_be_filled(image_folder, tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    monkeypatch.chdir(tmp_path / "set")
    make_static_views(str(image_folder / "train"), ".", "moco", 1, workers=1)
    assert (tmp_path / "set.json").exists() and len(list((tmp_path / "set").glob("*/*-2.jpeg"))) > 0


def test_refusals_are_one_sentence(image_folder, tmp_path, capsys):
    data, out = str(image_folder / "train"), str(tmp_path / "set")
    make_static_views(data, out, "moco", 1, workers=1)
    for arguments, message in [
        (
            [data, out, "--seed", "1", "--images-per-class", "3"],
            "was made with --seed 0: use the same, or choose another folder",
        ),
        ([data, str(tmp_path), "--aug", "hard"], "is not empty and"),
        ([data + "/class0", str(tmp_path / "x")], "holds images without classes"),
        ([data, data + "/views"], "the views would become images of it"),
        ([data, out, "--images-per-class", "0"], "must be at least 1"),
        ([data, out, "--quality", "0"], "--quality must be from 1 to 95"),
        ([str(tmp_path / "nowhere"), out], "does not exist"),
    ]:
        assert run_command(static_views.main, arguments) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("fastssl: error: ") and message in line
    for text in ("[]", "{}", "{", '{"images": []}'):  # annotations, as they lie beside other folders
        (tmp_path / "photos.json").write_text(text)
        with pytest.raises(ValueError, match=r"photos.json holds no options of a view set: move it away"):
            make_static_views(data, str(tmp_path / "photos"), workers=1)
    (tmp_path / "bad/a").mkdir(parents=True)
    (tmp_path / "bad/a/0.jpg").write_text("not an image")
    with pytest.raises(ValueError, match=r"no image can be used \(1 tried\), the first is .*bad/a/0.jpg"):
        make_static_views(str(tmp_path / "bad"), str(tmp_path / "w"), workers=1)
    (tmp_path / "two/a").mkdir(parents=True)
    for name in ("same.png", "same.bmp"):
        Image.new("RGB", (8, 8)).save(tmp_path / "two/a" / name)
    with pytest.raises(ValueError, match=r"same.bmp and .*same.png would both be .*same-0.jpeg: rename one"):
        make_static_views(str(tmp_path / "two"), str(tmp_path / "y"), workers=1)
    with pytest.raises(ValueError, match="unknown --aug 'soft': choose one of moco, nointer"):
        make_view_pair(Image.new("RGB", (8, 8)), "soft", 0)
    assert (
        static_views.draw(static_views.Job(str(tmp_path / "two/a/same.png"), str(tmp_path / "z"), "moco", 0, 75)).error
        == ""
    )


def test_the_projects_own_command_line(image_folder, tmp_path, capsys):
    arguments = [str(image_folder / "train"), str(tmp_path / "set"), "--aug=moco", "--images-per-class=50"]
    assert run_command(static_views.main, [*arguments, "--workers", "1"]) == 0
    assert "24 images with 2 views" in capsys.readouterr().out
