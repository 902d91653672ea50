"""The step, whole-loop and peers benchmarks run: every contestant in the result, figures that add up."""

import argparse
import gc
import json
import weakref

import pytest
import torch

from bench_throughput import main
from fastssl import distributed
from fastssl.bench import loop_lines, loops, peer_loops, peers, step, step_floor, step_parts, step_profile, whole_loop
from fastssl.bench.peer_views import augment_crops, colour_maps
from fastssl.bench.photos import write_photos
from fastssl.bench.step_flags import add_inner_flags, add_step_flags, make_config, parse_flags
from fastssl.bench.step_floor import count_encoder
from fastssl.bench.step_profile import busy, profile_step
from fastssl.bench.timing import time_in_turn
from fastssl.config import flat
from fastssl.machine.precision import bf16_unit
from fastssl.trials import layout

# only a CPU with instructions for bf16 gains from AMP
CLASSICAL = {"classical", "classical, AMP"} if bf16_unit() else {"classical"}
TINY = "--image-size 32 --batch-size 4 --queue-size 40 --steps 1 --rounds 2 --device cpu --compile off".split()


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch):
    """Less of what is done before and beside the turns; which layout a run takes is tested with layouts."""
    for module in (loops, step_parts, step_profile):
        monkeypatch.setattr(module, "WARM_UP", 1)
    monkeypatch.setattr(step_profile, "STEPS", 2)
    monkeypatch.setattr(step_floor, "time_in_turn", lambda calls, device, rounds: time_in_turn(calls, device, 1))
    monkeypatch.setattr(layout, "time_layouts", lambda *_: dict.fromkeys(layout.LAYOUT_NAMES, 1.0))


def tiny_args(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_step_flags(parser)
    return parse_flags(parser, [*TINY, *flags])


def test_step(tmp_path, capsys):
    flags = ["--arch", "resnet18", "mobilenetv3_small", *TINY, "--also-compile", "off", "--profile"]
    assert main(["step", *flags, "--output", str(tmp_path / "step.json")]) == 0
    lines = json.loads((tmp_path / "step.json").read_text())["lines"]
    assert [line["settings"]["arch"] for line in lines] == ["resnet18", "mobilenetv3_small"]
    for line in lines:
        assert {name: len(seconds) for name, seconds in line["seconds_of_rounds"].items()} == {
            "step": 2,
            "eager step": 2,
            "step, --compile off": 2,
        }
        assert {"aten::mkldnn_convolution", "WinogradProducts"} & kernels_of(line["profile"])
        assert set(line["parts"]) == {"augmentation", "encoder_k", "encoder_q", "loss", "optimiser + EMA + queue"}
        assert min(line["parts"].values()) > 0 and line["floor"]["arithmetic_seconds"] > 0
        assert line["settings"]["image_size"] == 32
    text = capsys.readouterr().out
    assert "with the profiler a step takes " in text and " x  aten::" in text
    assert "pairs/s" in text and "verdict: mobilenetv3_small: bound by the " in text


@pytest.mark.parametrize("stage", ["step", "all"])
def test_a_recipe_is_measured_as_it_is_but_for_flags(stage, tmp_path, capsys, make_image_folder):
    output = tmp_path / "step.json"
    flags = "--config cifar10_resnet18 --image-size 16 --batch-size 16 --queue-size 40 --compile off".split()
    flags += ["--steps", "1", "--rounds", "1"]
    if stage == "all":
        images = make_image_folder(tmp_path / "images", {"train": 16})
        flags += ["--data", str(images), "--loader", "resident", "--no-eager"]
    assert main([stage, *flags, "--device", "cpu", "--output", str(output)]) == 0
    (line,) = json.loads(output.read_text())["lines"]
    kept = {"arch": "resnet18", "stem": "cifar", "symmetric": True, "bn_splits": 16, "lr": 0.06}
    kept |= {"policy": "v2", "gaussian_blur": 0.0, "contrast_weight": 2.0, "temperature": 0.1}
    assert {name: line["settings"][name] for name in kept} == kept
    given = {"image_size": 16, "synthetic_size": 16, "queue_size": 40, "batch_size": 16}
    assert {name: line["settings"][name] for name in given} == given
    assert ("not measured: its loss goes one way" in capsys.readouterr().out) == (stage == "all")


@pytest.mark.parametrize("flags, size", [([], 32), (["--image-size", "48"], 48)])
def test_the_image_size_is_the_recipes_unless_a_flag_gives_one(flags, size):
    parser = argparse.ArgumentParser()
    add_inner_flags(parser)
    add_step_flags(parser)
    settings = flat(make_config(parse_flags(parser, ["--config", "cifar10_resnet18", *flags]), "resnet18"))
    assert (settings["image_size"], settings["synthetic_size"]) == (size, size)


def test_a_symmetric_step_has_twice_the_operations():
    args = tiny_args()
    one, two = (count_encoder(make_config(args, "resnet18", symmetric=both)) for both in (False, True))
    assert two == pytest.approx([2 * one[0], 2 * one[1]])


def kernels_of(profile):
    taken = [kernel["seconds"] for kernel in profile["kernels"]]
    assert taken == sorted(taken, reverse=True) and 0 < sum(taken) < 1.01 * profile["seconds"] * torch.get_num_threads()
    return {kernel["name"] for kernel in profile["kernels"]}


def test_a_gpu_is_busy_while_any_of_its_streams_is():
    assert busy([]) == 0
    assert busy([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.75), (3.0, 3.5)]) == 4.5


@pytest.mark.gpu
def test_a_gpus_kernels_are_named(monkeypatch):
    monkeypatch.setattr(step_profile, "LONGEST", 1000)  # that of the views need not be among the longest
    args = argparse.Namespace(**{**vars(tiny_args()), "device": "cuda"})
    config, ranks = make_config(args, "resnet18"), distributed.start("cuda")
    profile = profile_step(config, ranks, loops.trainee_of(config, ranks))
    assert 0 < profile["busy_seconds"] < profile["seconds"] and profile["launches"] > 100
    assert "crop_tiles" in kernels_of(profile)


def test_the_host_alone_is_timed_step_by_step():
    config, ranks = make_config(tiny_args(), "resnet18"), distributed.start("cpu")
    assert loops.host_alone(config, ranks, loops.trainee_of(config, ranks))(2) > 0


def test_whole_loop_over_a_folder_and_a_beton(tmp_path, capsys, make_image_folder):
    data = make_image_folder(tmp_path / "images", {"train": 8})
    output = tmp_path / "all.json"
    asked = ["folder", "resident", "auto"]
    flags = ["--data", str(data), *TINY, "--workers", "0", "--loader", *asked, "--output", str(output)]
    assert main(["all", *flags]) == 0
    line = json.loads(output.read_text())["lines"][0]
    found = ("folder", "resident", "auto (resident)")
    ours = {"step", "eager step", *(f"{what}, {name}" for what in ("all", "loader alone") for name in found)}
    assert set(line["seconds_of_rounds"]) == ours | CLASSICAL
    text = capsys.readouterr().out
    assert "verdict: resnet18, all, folder: bound by" in text and "verdict: resnet18, all, resident: bound by" in text


def test_the_whole_loop_does_without_the_classical_one_on_a_flat_folder(tmp_path, capsys):
    write_photos(tmp_path, 4, sides=(60, 80))
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in sorted((tmp_path / "train").rglob("*.jpg")):
        file.rename(flat / file.name)
    assert main(["all", "--data", str(flat), *TINY, "--workers", "0", "--output", str(tmp_path / "all.json")]) == 0
    (line,) = json.loads((tmp_path / "all.json").read_text())["lines"]
    assert set(line["not_measured"]) == {"classical", "classical, AMP"} and line["beside"] == "eager step"
    assert "not measured: the classical loop needs images in class folders: Couldn't find" in capsys.readouterr().out


def test_an_encoder_that_fails_does_not_stop_the_others_and_none_stays_in_memory(tmp_path, monkeypatch, capsys):
    args, ranks, alive = argparse.Namespace(**vars(tiny_args()), arch=["resnet18", "deit_tiny", "resnet50"]), None, []
    args.output, ranks = tmp_path / "step.json", distributed.start("cpu")

    def measure(arch, keep):
        assert not [reference for reference in alive if reference()]
        encoder = torch.nn.Linear(2, 2)
        encoder.itself = [encoder]  # a cycle, as torch.compile leaves
        alive.append(weakref.ref(encoder))
        if arch == "deit_tiny":
            raise torch.OutOfMemoryError("too\nlarge")
        return {"settings": {"arch": arch}}

    monkeypatch.setattr(loop_lines, "print_line", lambda *_: None)
    gc.disable()
    try:
        with pytest.raises(ValueError, match=r"not measured: deit_tiny \(OutOfMemoryError: too large\)"):
            loop_lines.measure_each(args, ranks, measure)
    finally:
        gc.enable()
    lines = json.loads(args.output.read_text())["lines"]
    assert [line["settings"]["arch"] for line in lines] == ["resnet18", "resnet50"] and len(alive) == 3


@pytest.mark.parametrize("stage", [step, peers, whole_loop])
def test_names_are_looked_at_before_anything_is_made_or_measured(stage, monkeypatch, capsys):
    for name in ("open_data", "measure"):
        monkeypatch.setattr(stage, name, lambda *_: pytest.fail("it began"), raising=False)
    with pytest.raises(ValueError, match="unknown architecture 'nosuch'"):
        stage.main([*TINY, "--arch", *(["resnet18"] if stage is not peers else []), "nosuch"])
    if stage is whole_loop:
        with pytest.raises(SystemExit):
            stage.main([*TINY, "--loader", "folder", "nosuch"])
        assert "--loader: invalid choice: 'nosuch'" in capsys.readouterr().err


def test_the_seconds_so_far_are_kept_after_each_round():
    kept = []
    loops.time_loops({"a": lambda steps: 1.0, "b": lambda steps: 2.0}, 1, 2, lambda s: kept.append(json.dumps(s)))
    assert kept == ['{"a": [1.0], "b": [2.0]}', '{"a": [1.0, 1.0], "b": [2.0, 2.0]}']


@pytest.mark.parametrize("stage", ["step", "all"])
def test_ctrl_c_in_the_second_round_keeps_the_first(stage, tmp_path, monkeypatch, capsys, make_image_folder):
    begun, part = [], step_parts.repeat

    def interrupted(*given):
        loop = part(*given)

        def turn(steps):
            begun.append(steps)
            if len(begun) > 5:
                raise KeyboardInterrupt
            return loop(steps)

        return turn

    monkeypatch.setattr(step_parts, "repeat", interrupted)
    output = tmp_path / "out" / f"{stage}.json"
    images = ["--data", str(make_image_folder(tmp_path / "images", {"train": 4})), "--no-classical"]
    flags = ["--arch", "resnet18", *TINY, "--no-eager", *(images if stage == "all" else [])]
    with pytest.raises(KeyboardInterrupt):
        main([stage, *flags, "--report", str(output.parent)])
    (line,) = json.loads(output.read_text())["lines"]
    assert {len(seconds) for seconds in line["seconds_of_rounds"].values()} == {1} and len(line["parts"]) == 5
    assert "step: bound by" in capsys.readouterr().out.replace("resnet18:", "step:")
    assert output.with_suffix(".md").exists()


def test_the_parts_of_a_step_that_accumulates_have_its_shapes():
    config, ranks = make_config(tiny_args(), "resnet18", accumulate=2), distributed.start("cpu")
    trainee, batches = loops.trainee_of(config, ranks), []
    trainee.encoder_q.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    parts = step_parts.step_parts(config, trainee, ranks)
    parts[f"{step_parts.PART}encoder_q"](1)
    assert batches == [2, 2, 2]  # half the batch to warm up, then both halves
    before = trainee.moco.queue.clone()
    parts[f"{step_parts.PART}{step_parts.REST}"](1)
    assert (trainee.moco.queue != before).any(dim=1).sum() == 2 * 4  # a whole batch to warm up, then another


def test_the_seconds_of_a_part_are_its_median():
    config = make_config(tiny_args(), "resnet18")
    line = loop_lines.as_line(config, {"step": [1.0, 1.0], f"{step_parts.PART}loss": [1.0, 2.0]}, 1, "step")
    assert line["parts"] == {"loss": 1.5}


def broken(*_, **__):
    raise ImportError("no module named nvidia")


def test_peers_names_what_cannot_run(tmp_path, monkeypatch, capsys, make_image_folder):
    monkeypatch.setattr(peers, "dali_loop", broken)
    data = make_image_folder(tmp_path / "images", {"train": 8})
    flags = [str(data), *TINY, "--workers", "0", "--loader", "folder", "--output", str(tmp_path / "peers.json")]
    monkeypatch.setattr(peers, "ffcv_loop", broken)
    assert main(["peers", *flags]) == 0
    line = json.loads((tmp_path / "peers.json").read_text())["lines"][0]
    assert set(line["seconds_of_rounds"]) == {"ours, folder"} | CLASSICAL
    assert line["not_measured"]["DALI, as solo-learn"] == "ImportError: no module named nvidia"
    text = capsys.readouterr().out
    assert "FFCV, a decoder per view" in text and "not measured: ImportError" in text
    assert "not measured: DALI, as solo-learn, FFCV, a decoder per view" in text


def test_peers_refuse_too_few_images_before_they_make_anything(tmp_path, monkeypatch, make_image_folder):
    monkeypatch.setattr(peers, "make_loops", lambda *_: pytest.fail("its encoders take minutes to compile"))
    with pytest.raises(ValueError, match="3 images do not fill a batch of 4: use --batch-size 3 or less"):
        main(["peers", str(make_image_folder(tmp_path / "images", {"train": 1})), *TINY])


def test_peers_go_on_without_the_classical_loop(tmp_path, monkeypatch, capsys, make_image_folder):
    for peer in ("dali_loop", "classical_loop"):
        monkeypatch.setattr(peers, peer, broken)
    data, output = make_image_folder(tmp_path / "images", {"train": 8}), tmp_path / "peers.json"
    monkeypatch.setattr(peers, "ffcv_loop", lambda *_: lambda steps: 1.0 * steps)
    flags = [str(data), *TINY, "--loader", "folder", "--output", str(output)]
    assert main(["peers", *flags]) == 0
    line = json.loads(output.read_text())["lines"][0]
    assert line["beside"] == "FFCV, a decoder per view" and "classical" in line["not_measured"]
    assert "times the rate of the fastest other, 'FFCV, a decoder per view'" in capsys.readouterr().out
    monkeypatch.setattr(peers, "ffcv_loop", broken)
    assert main(["peers", *flags]) == 0
    assert json.loads(output.read_text())["lines"][0]["beside"] == "ours, folder"
    assert "none of the others ran; not measured: DALI" in capsys.readouterr().out


@pytest.mark.parametrize("peer, library", [("dali_loop", "nvidia.dali"), ("ffcv_loop", "ffcv")])
def test_a_peers_loop_trains(tmp_path, peer, library):
    pytest.importorskip(library)
    write_photos(tmp_path / "photos", 12, sides=(60, 80))
    data, beton = peers.open_data(str(tmp_path / "photos"), None, tmp_path, 12)
    ranks = distributed.start("cpu")
    loop = getattr(peers, peer)(data if peer == "dali_loop" else beton, make_config(tiny_args(), "resnet18"), ranks, 1)
    assert loop(2) > 0
    assert loop(1) > 0  # a second turn goes on


@pytest.mark.parametrize(
    "unit, precision, amp", [("AVX512-BF16", "auto", True), ("AVX512-BF16", "fp32", False), ("", "auto", False)]
)
@pytest.mark.parametrize("peer, library", [("dali_loop", "nvidia.dali"), ("ffcv_loop", "ffcv")])
def test_a_peer_trains_in_16_bits_where_our_loop_does(tmp_path, monkeypatch, peer, library, unit, precision, amp):
    pytest.importorskip(library)
    asked = []
    monkeypatch.setattr("fastssl.machine.precision.bf16_unit", lambda: unit)
    monkeypatch.setattr(peer_loops, "make_classical_step", lambda config, device, amp: asked.append(amp))
    write_photos(tmp_path / "photos", 4, sides=(60, 80))
    data, beton = peers.open_data(str(tmp_path / "photos"), None, tmp_path, 4)
    source = data if peer == "dali_loop" else beton
    config = make_config(tiny_args("--precision", precision), "resnet18")
    getattr(peer_loops, peer)(source, config, distributed.start("cpu"), 1)
    assert asked == [amp]


def test_photos_differ_and_have_the_sides_asked_for(tmp_path):
    from PIL import Image

    write_photos(tmp_path, 16, sides=(60, 80))
    files = sorted(tmp_path.rglob("*.jpg"))
    assert len(files) == 16 == len({file.read_bytes() for file in files})
    sizes = set()
    for file in files:
        with Image.open(file) as image:
            sizes.add(image.size)
    assert sizes == {(80, 60), (60, 80)}


def test_the_colour_map_of_an_image_is_its_operations_in_order():
    torch.manual_seed(0)
    x = torch.rand(64, 3, 8, 8)
    matrix, offset = colour_maps(x)
    grey = torch.full((3,), 0.5)
    assert torch.allclose(
        matrix.sum(2), matrix.sum(2).mean(1, keepdim=True).expand(-1, 3), atol=1e-3
    )  # grey stays grey
    untouched = (matrix - torch.eye(3)).abs().amax((1, 2)) < 1e-5
    assert 0 < untouched.sum() < 64 and offset[untouched].abs().max() < 1e-5
    assert torch.allclose(matrix[untouched] @ grey, grey.expand(int(untouched.sum()), 3), atol=1e-5)
    views = augment_crops((x * 255).byte())
    assert views.shape == x.shape and views.isfinite().all() and views.std() > 0.1


def test_operations_of_a_step_are_those_of_resnet18():
    args = tiny_args()
    args.image_size, args.batch_size = 224, 1
    operations, elements = count_encoder(make_config(args, "resnet18", head="linear"))
    stem = 112**2 * 64 * 3 * 7**2  # the gradient of the images is not computed
    assert operations == pytest.approx(2 * (4 * 1.814e9 - stem), rel=0.002)  # 1.81 G multiply-adds, as published
    assert elements > 3 * 2 * 1e6
