"""`fastssl check-augment` and `fastssl preview`: what they print, and that a wrong operation is found out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

import bench_throughput
from fastssl.augment import parity, rates
from fastssl.augment.params import sample_params
from fastssl.augment.policy import make_policy
from fastssl.bench import augment as bench_augment
from fastssl.bench import augment_dali, augment_peers
from fastssl.cli import main
from fastssl.commands import check_augment, preview
from fastssl.loaders.synthetic_loader import SyntheticLoader


def test_all_bounds_hold_on_rendered_pictures(capsys: pytest.CaptureFixture) -> None:
    assert main(["check-augment", "--images", "6", "--size", "48"]) == 0
    said = capsys.readouterr().out
    assert "FAILS" not in said and "whole chain, small" in said
    passed, checks = map(int, said.splitlines()[-1].removesuffix(" checks passed").split(" of "))
    assert passed == checks > 40


def test_photographs_of_a_folder(image_folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["check-augment", str(image_folder), "--images", "4", "--size", "32", "--policy", "v2"]) == 0
    assert capsys.readouterr().out.startswith("4 pictures, views of 32 pixels")


def test_unreadable_images_are_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for i in range(3):
        Image.effect_noise((40, 30), 60).convert("RGB").save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"no image")
    assert main(["check-augment", str(tmp_path), "--size", "16", "--policy", "v2"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("2 pictures") and said.err.startswith(f"left out: {tmp_path / '1.png'}: not an image")
    assert main(["preview", str(tmp_path), "--image-size", "16", "--output", str(tmp_path / "views.out")]) == 0
    said = capsys.readouterr()
    assert "2 images with their views" in said.out and "1.png: not an image" in said.err


@pytest.mark.parametrize("name", ["update_hue", "update_contrast", "update_blur"])
def test_a_wrong_operation_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(parity, name)

    def wrong(x: torch.Tensor, *params: torch.Tensor) -> None:
        right(x, *params)
        x[..., ::2] += 3

    monkeypatch.setattr(parity, name, wrong)
    rows = list(parity.operation_rows(check_augment.draw_pictures(2), 32))
    assert any(not row.holds for row in rows)


def test_wrong_rates_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rates.sample_params

    def one_sided(*args):
        p = right(*args)
        return p._replace(hue=p.hue.abs(), blur=~p.jitter, order=p.order // 2)

    monkeypatch.setattr(rates, "sample_params", one_sided)
    wrong = {name for name, holds, _ in rates.count_checks(make_policy("v2")) if not holds}
    assert {
        "blur has probability 0.5",
        "hue turns either way equally often",
        "the 24 orders are equally frequent",
    } <= wrong
    assert "flip has probability 0.5" not in wrong


def test_a_failed_check_is_an_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(check_augment, "operation_rows", lambda *_: [parity.Row("crop", 2.0, 9.0, 0.3, 1)])
    assert main(["check-augment", "--images", "1", "--size", "16", "--policy", "none"]) == 1
    assert "FAILS" in capsys.readouterr().out


def test_bad_arguments_of_check_augment(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["check-augment", "--images", "0"])
    assert "argument --images: must be at least 1, got 0" in capsys.readouterr().err
    assert main(["check-augment", str(tmp_path)]) == 1


def test_preview_writes_a_picture(image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "views.png"
    flags = ["--policy", "v2", "--image-size", "32", "--policy-set", "solarise_p=1", "--crop-pair", "hard"]
    assert main(["preview", str(image_folder), *flags, "--output", str(file)]) == 0
    with Image.open(file) as picture:
        assert picture.width > 1000
    assert "8 images with their views, policy v2" in capsys.readouterr().out
    assert main(["preview", str(image_folder), "--output", str(tmp_path)]) == 1
    assert "is a folder: name a file" in capsys.readouterr().err
    assert main(["preview", str(image_folder), "--output", str(tmp_path / "none" / "views.png")]) == 1
    assert "does not exist; create it first" in capsys.readouterr().err
    assert main(["preview", str(image_folder), "--output", str(tmp_path / "views.jpg")]) == 1
    assert "the picture is a PNG file; name it views.png" in capsys.readouterr().err
    assert preview.COUNT == 8


def test_images_none_of_which_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "x.jpg").write_text("no image")
    for command in (["check-augment"], ["preview", "--output", str(tmp_path / "views.png")]):
        assert main([command[0], str(tmp_path), *command[1:]]) == 1
        said = capsys.readouterr().err
        assert f"no image in {tmp_path} can be read (1 tried)" in said and "x.jpg: not an image" in said


@pytest.fixture
def no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if kornia and DALI were not installed: to compile kornia takes minutes."""
    monkeypatch.setattr(bench_augment, "find_spec", lambda name: None)


def test_bench_augment(tmp_path: Path, capsys: pytest.CaptureFixture, no_peers: None) -> None:
    flags = "--device cpu --batch-size 2 --size 32 --source-size 40 --rounds 1"
    bench_throughput.main(["augment", *flags.split(), "--output", str(tmp_path / "augment.json")])
    said = capsys.readouterr().out
    assert (
        "torchvision, PIL images" in said
        and "triton-augment, its part     not installed" in said
        and "% of the floor" in said
    )
    assert (tmp_path / "augment.json").stat().st_size > 500


def test_bench_augment_on_photographs(image_folder: Path, capsys: pytest.CaptureFixture, no_peers: None) -> None:
    flags = "--device cpu --batch-size 3 --size 16 --short-side 20 --rounds 1"
    bench_throughput.main(["augment", str(image_folder), *flags.split()])
    said = capsys.readouterr().out
    assert "torchvision, PIL, 1 workers" in said and "kornia, compiled" in said
    with pytest.raises(ValueError, match="holds fewer than 99 images: set --batch-size"):
        bench_throughput.main(["augment", str(image_folder), *"--device cpu --batch-size 99".split()])


def test_the_part_for_triton_augment_is_a_crop_that_is_not_resized() -> None:
    loader = SyntheticLoader(num_images=64, size=40, batch_size=64, seed=0, device="cpu")
    batch = next(loader.batches())
    part = augment_peers.part_policy(batch, make_policy("v1"), 33)
    p = sample_params(part, batch, 0, 0, 0)
    assert (p.crop_height == 33).all() and (p.crop_width == 33).all() and p.top.unique().numel() > 5
    assert p.jitter.all() and not p.hue.any() and not p.blur.any() and (part.grey_p, part.saturation) == (0.2, 0.4)
    assert augment_peers.equal_sizes(batch, square=True)
    assert not augment_peers.equal_sizes(batch._replace(width=batch.width + 1), square=True)
    assert not augment_peers.equal_sizes(batch._replace(width=batch.width + torch.arange(64)))


@pytest.mark.gpu
def test_triton_augment_makes_views_of_the_same_shape() -> None:
    pytest.importorskip("triton_augment", reason="needs triton-augment")
    loader = SyntheticLoader(num_images=4, size=40, batch_size=4, seed=0, device="cuda")
    batch = next(loader.batches())
    part = augment_peers.part_policy(batch, make_policy("v2"), 32)
    for view in augment_peers.make_triton_augment(batch, part, 32, torch.bfloat16)():
        assert view.shape == (4, 3, 32, 32) and view.dtype == torch.bfloat16 and view.isfinite().all()


def test_dali_makes_views_of_the_same_shape() -> None:
    pytest.importorskip("nvidia.dali", reason="needs DALI")
    loader = SyntheticLoader(num_images=4, size=40, batch_size=4, seed=0, device="cpu")
    views = augment_dali.make_dali(next(loader.batches()), make_policy("v2"), 32)()
    assert [view.at(3).shape for view in views] == [(32, 32, 3)] * 2


@pytest.mark.parametrize("size", [1, 8, 9, 224])
def test_torchvision_blurs_views_smaller_than_its_kernel(size: int) -> None:
    chain = augment_peers.torchvision_chain(make_policy("v2", gaussian_blur=1.0), size, on_pil=False)
    assert chain(torch.zeros(3, 30, 40, dtype=torch.uint8)).shape == (3, size, size)
    assert augment_peers.blur_side(size) == {1: 1, 8: 15}.get(size, 17)


def test_views_of_single_images_end_on_the_device() -> None:
    chain = augment_peers.torchvision_chain(make_policy("v2"), 8, on_pil=True)
    views = augment_peers.per_image([Image.new("RGB", (9, 9))] * 3, chain, torch.float32, torch.device("meta"))
    assert all(view.is_meta and view.shape == (3, 3, 8, 8) for view in views)


@pytest.mark.parametrize("when", ["it is made", "it is called"])
def test_a_peer_that_is_broken_is_named(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    def broken() -> None:
        raise ImportError("libcuda\n is missing")

    batch = next(SyntheticLoader(num_images=2, size=8, batch_size=2, seed=0, device="cpu").batches())
    monkeypatch.setattr(
        bench_augment, "obstacles", lambda *_: {bench_augment.KORNIA: "x", bench_augment.TRITON_AUGMENT: "x"}
    )
    monkeypatch.setattr(bench_augment, "make_dali", lambda *_: broken() if when == "it is made" else broken)
    found, missing = bench_augment.make_contestants(batch, make_policy("v2"), 8, torch.float32)
    assert missing["DALI"] == "ImportError: libcuda is missing" and "DALI" not in found and "ours, reference" in found
