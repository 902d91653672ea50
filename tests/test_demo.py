"""The demo: pictures that only their stripes tell apart, and the chain from drawing to the table."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression

from fastssl import demo, train
from fastssl.cli import main
from fastssl.command import PREEMPTED
from fastssl.demo import free_folder
from fastssl.demo_images import CLASSES, draw_picture, write_demo_images


@pytest.fixture(scope="module")
def pictures():
    labels = np.arange(1000) % len(CLASSES)
    names = list(CLASSES)
    return np.stack([draw_picture(names[c], np.random.default_rng(i), 32) for i, c in enumerate(labels)]), labels


def test_colour_and_brightness_do_not_tell_the_class(pictures):
    images, labels = pictures
    x = images.astype(float) / 255
    features = np.concatenate([x.mean((1, 2)), x.std((1, 2)), x.min((1, 2)), x.max((1, 2))], axis=1)
    features = (features - features.mean(0)) / features.std(0)
    model = LogisticRegression(max_iter=1000).fit(features[:700], labels[:700])
    assert model.score(features[700:], labels[700:]) < 0.2  # chance is 0.1


def test_direction_and_spacing_of_the_stripes_tell_the_class(pictures):
    """The strongest frequency of the grey picture lies at the class's angle, and its distance is the spacing."""
    images, labels = pictures
    right = 0
    for image, label in zip(images[:200], labels):
        grey = image.astype(float).mean(axis=2)
        power = np.abs(np.fft.rfft2(grey - grey.mean())) ** 2
        power[0, 0] = power[:2, :2].min()  # patches of light
        row, column = np.unravel_index(power.argmax(), power.shape)
        row = min(row, len(power) - row)
        angle, stripes = list(CLASSES.values())[label]
        found = np.degrees(np.arctan2(row, column))
        right += abs(found - angle) < 25 and abs(np.hypot(row, column) - stripes) < 2.5
    assert right > 160


def test_pictures_are_a_function_of_the_seed(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_demo_images(tmp_path / name, seed, train=20, val=10, size=16)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.jpg"))
    assert len(files) == 30 and len({f.parent for f in files}) == 20
    contents = {name: [(tmp_path / name / f).read_bytes() for f in files] for name in "abc"}
    assert contents["a"] == contents["b"]
    assert len({*contents["a"], *contents["c"]}) == 60  # and no picture is another's, of either split
    with Image.open(tmp_path / "a" / files[0]) as picture:
        assert picture.size == (16, 16)
    assert not (tmp_path / "a.partial").exists()


def small_demo(monkeypatch, *argv):
    monkeypatch.setattr(demo, "IMAGES", (80, 40))
    monkeypatch.setattr(demo, "IMAGES_SEEN", 128)
    return main(["demo", "--device", "cpu", *map(str, argv)])


def test_from_nothing_to_the_table_and_again(tmp_path, monkeypatch, capsys, drawn_curves):
    folder = tmp_path / "out"
    assert small_demo(monkeypatch, "--output", folder) == 0
    table = capsys.readouterr().out
    result = json.loads((folder / "demo.json").read_text())
    assert list(result["knn_percent"]) == ["raw pixels", "untrained resnet18", "pretrained resnet18"]
    for name, value in result["knn_percent"].items():
        assert 0 <= value <= 100 and f"{name:<22}{value:5.1f} %" in table
    for name in ("curves", "views", "checkpoint"):
        assert result[name] in table and (tmp_path / result[name]).stat().st_size > 0
    assert result["images_per_second"] > 0 and result["images_seen"] == 128

    recorded = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if "knn" in line]
    assert result["knn_percent"]["pretrained resnet18"] == pytest.approx(recorded[-1]["knn"], abs=0.01)

    drawn = {p: p.stat().st_mtime_ns for p in folder.rglob("*.jpg")}
    assert len(drawn) == 120
    assert small_demo(monkeypatch, "--output", folder) == 0
    assert drawn == {p: p.stat().st_mtime_ns for p in folder.rglob("*.jpg")}
    assert "the run is complete" in capsys.readouterr().err
    assert json.loads((folder / "demo.json").read_text())["knn_percent"] == result["knn_percent"]

    assert small_demo(monkeypatch, "--output", folder, "--seed", 1) == 1  # would tell seed 0's figures
    assert "holds a demo with --seed 0: choose another --output" in capsys.readouterr().err


def test_stopped_by_a_signal_and_continued_as_its_message_says(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(train.StopSignal, "__call__", lambda self: True)
        assert small_demo(patch, "--output", folder) == PREEMPTED
    text = capsys.readouterr().err
    assert f"saved after step 1; continue with the same command and --output {folder}" in text  # it has no --resume
    assert small_demo(monkeypatch, "--output", folder) == 0
    assert "resuming from" in capsys.readouterr().err


def test_an_image_folder_of_ones_own(tmp_path, image_folder, monkeypatch, capsys):
    flat = tmp_path / "flat"
    shutil.copytree(image_folder / "train" / "class0", flat)
    assert small_demo(monkeypatch, "--data", flat, "--output", tmp_path / "out") == 0
    assert "these images are not in class folders" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "demo.json").read_text())["knn_percent"] == {}
    assert len(list(flat.iterdir())) == 8  # nothing was written there

    for image in sorted(flat.iterdir())[2:]:
        image.unlink()
    assert small_demo(monkeypatch, "--data", flat, "--output", tmp_path / "few") == 1
    assert "holds only 2 images: the demo needs at least" in capsys.readouterr().err


def test_a_folder_of_something_else_is_left_alone(image_folder, monkeypatch, capsys):
    before = sorted(image_folder.rglob("*"))
    assert small_demo(monkeypatch, "--output", image_folder) == 1
    assert "holds something else than a demo: choose another --output" in capsys.readouterr().err
    assert sorted(image_folder.rglob("*")) == before


def test_a_new_folder_each_time(tmp_path):
    names = []
    for _ in range(3):
        names.append(free_folder(tmp_path).name)
        free_folder(tmp_path).mkdir()
    assert names == ["demo", "demo-2", "demo-3"]
