"""Encoders for other programs: every format loads there strictly and computes the same; the old layout round-trips."""

import importlib.util
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torchvision.models as tv
from old_checkpoints import OldMoCo, make_head, make_moco, make_network, make_seed
from torch import nn

from fastssl import export, verify_export
from fastssl.build import make_trainee
from fastssl.checkpoint import CheckpointError
from fastssl.command import run_command
from fastssl.commands import convert, models
from fastssl.config import Config, replace
from fastssl.distributed import Ranks
from fastssl.eval import knn
from fastssl.eval.options import finish_options
from fastssl.eval.session import Session
from fastssl.foreign import load_pretrained
from fastssl.models.encoders import make_backbone
from fastssl.resume import state_of

ROOT = Path(__file__).parents[1]
RANKS = Ranks(0, 1, torch.device("cpu"))
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def save_run(folder, steps=7, **options):
    """A run folder of fastssl with one checkpoint, whose optimiser and queue are not fresh; gives its trainee too."""
    options = {"arch": "resnet18", "head": "simple", "queue_size": 64, "dim": 128, "stem": "imagenet", **options}
    config = replace(Config(), device="cpu", batch_size=8, seed=3, channels_last="on", **options)
    trainee = make_trainee(config, RANKS)
    size = 224 if config.model.arch in ("vit_tiny", "deit_tiny") else 64
    encoder = trainee.moco.encoder_q
    encoder.head(encoder.backbone(torch.randn(4, 3, size, size))).square().sum().backward()
    trainee.optimizer.step()
    trainee.moco.update_queue(torch.nn.functional.normalize(torch.randn(24, config.model.dim), dim=1))
    path = folder / "checkpoints" / f"step_{steps:09d}.pt"
    path.parent.mkdir(parents=True)
    torch.save(state_of(trainee, steps, config, 24, 1), path)
    encoder.eval()
    return trainee


def outputs(module, images=IMAGES):
    with torch.no_grad():
        return module.eval()(images)


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize(
    "arch, stem, head, suffix",
    [("mobilenetv3_small", "imagenet", head, suffix) for head in (True, False) for suffix in (".safetensors", ".pth")]
    + [("resnet18", "cifar", True, ".safetensors"), ("resnet18", "cifar", False, ".pth")],
)
def test_plain_files_come_back_whole(tmp_path, capsys, suffix, head, arch, stem):
    trainee = save_run(tmp_path / "run", arch=arch, stem=stem, head="wide")
    out = tmp_path / f"encoder{suffix}"
    assert run_command(export.main, [str(tmp_path / "run"), str(out), *["--head"] * head]) == 0
    said = capsys.readouterr().out
    assert "fastssl checkpoint, the query encoder" in said and ("left out the head" in said) != head
    named = {} if suffix == ".safetensors" or stem == "imagenet" else {"stem": stem}
    module, report = load_pretrained(out, with_head=head, **named)
    assert (report.arch, report.stem, report.head) == (arch, stem, "wide" if head else "none")
    encoder = trainee.moco.encoder_q
    assert_same(outputs(module), outputs(encoder if head else encoder.backbone))
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v3_small", "tv_efficientnet_b0"])
def test_torchvision_names_load_in_torchvision(tmp_path, arch):
    trainee = save_run(tmp_path / "run", arch=arch, head="linear", dim=16)
    export.export(str(tmp_path / "run"), str(tmp_path / "tv.pth"), "torchvision", head=True)
    model = tv.get_model(arch.removeprefix("tv_"), weights=None, num_classes=16)
    model.load_state_dict(torch.load(tmp_path / "tv.pth", weights_only=True), strict=True)
    assert_same(outputs(model), outputs(trainee.moco.encoder_q))


@pytest.mark.parametrize(
    "arch, name", [("resnet18", "resnet18"), ("efficientnet_b0", "tf_efficientnet_b0"), ("tf_efficientnet_b1",) * 2]
)
def test_timm_names_load_in_timm(tmp_path, arch, name):
    trainee = save_run(tmp_path / "run", arch=arch)
    _, said = export.export(str(tmp_path / "run"), str(tmp_path / "timm.safetensors"), "timm")
    assert said == name
    model = timm.create_model(name, num_classes=0)
    model.load_state_dict(safetensors.torch.load_file(tmp_path / "timm.safetensors"), strict=True)
    images = torch.randn(2, 3, 224, 224)
    assert_same(outputs(model, images), outputs(trainee.moco.encoder_q.backbone, images))


@pytest.mark.parametrize("arch", ["resnet18", "mobilenetv3_small", "efficientnet_b0", "vit_tiny"])
def test_the_old_scripts_can_resume_our_runs(tmp_path, arch, capsys):
    trainee = save_run(tmp_path / "run", arch=arch)
    moco = trainee.moco
    assert run_command(convert.main, ["moco", str(tmp_path / "run"), str(tmp_path / "old.pth.tar")]) == 0
    assert "left out" not in capsys.readouterr().out
    saved = torch.load(tmp_path / "old.pth.tar", weights_only=True)
    assert (saved["epoch"], saved["arch"]) == (2, arch)  # 7 steps of 3 an epoch
    old = nn.ModuleDict({"module": OldMoCo(arch)})
    old.load_state_dict(saved["state_dict"], strict=True)  # of align + uniform alone: without scalar_label
    images = torch.randn(2, 3, 224, 224) if arch == "vit_tiny" else IMAGES
    assert_same(outputs(old.module.encoder_q, images), outputs(moco.encoder_q, images))
    assert_same(outputs(old.module.encoder_k, images), outputs(moco.encoder_k, images))
    assert torch.equal(old.module.queue.T, moco.queue) and old.module.queue_ptr.item() == 24
    optimizer = torch.optim.SGD(old.parameters(), 0.1, momentum=0.5)
    optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.param_groups[0]["lr"] == trainee.optimizer.param_groups[0]["lr"]
    theirs = {
        n: optimizer.state[p]["momentum_buffer"]
        for n, p in old.module.encoder_q.named_parameters()
        if p in optimizer.state
    }
    ours = {
        n: trainee.optimizer.state[p]["momentum_buffer"]
        for n, p in moco.encoder_q.named_parameters()
        if p.requires_grad
    }
    ours = {re.sub("^head[.]", "fc.", n).removeprefix("backbone."): v for n, v in ours.items()}
    assert set(theirs) == set(ours) and all(torch.equal(theirs[n], ours[n]) for n in ours)


@pytest.mark.parametrize("options", [{"optimizer": "adamw"}, {"exclude_norm_bias": True}])
def test_an_optimizer_that_the_old_scripts_have_not_is_named(tmp_path, capsys, options):
    save_run(tmp_path / "run", arch="mobilenetv3_small", **options)
    assert run_command(convert.main, ["moco", str(tmp_path / "run"), str(tmp_path / "old.pth.tar")]) == 0
    assert "optimizer" not in torch.load(tmp_path / "old.pth.tar", weights_only=True)
    said = capsys.readouterr().out
    assert "left out the optimizer's state, which is not plain SGD's: MoCo's scripts cannot --resume" in said


@pytest.mark.parametrize("arch", ["resnet18", "mobilenetv3_large"])
def test_moco_files_round_trip(tmp_path, arch):
    saved, _, _ = make_moco(arch, head="wide")
    torch.save(saved, tmp_path / "in.pth.tar")
    report, _ = export.export(str(tmp_path / "in.pth.tar"), str(tmp_path / "out.pth.tar"), "moco")
    assert not report.left_out
    again = torch.load(tmp_path / "out.pth.tar", weights_only=True)
    assert again["epoch"] == 200 and again["arch"] == arch
    assert {k: v.shape for k, v in again["state_dict"].items()} == {k: v.shape for k, v in saved["state_dict"].items()}
    assert all(torch.equal(v, again["state_dict"][k]) for k, v in saved["state_dict"].items())
    assert again["optimizer"]["param_groups"] == saved["optimizer"]["param_groups"]


def test_seed_becomes_what_its_converter_meant(tmp_path, capsys):
    saved, tensors, forward = make_seed("mobilenetv3_small")
    torch.save(saved, tmp_path / "seed.pth.tar")
    assert run_command(convert.main, ["seed", str(tmp_path / "seed.pth.tar")]) == 0
    converted = torch.load(tmp_path / "converted_seed.pth.tar", weights_only=True)
    expected = {
        k.replace("module.student.", "module.encoder_q."): v
        for k, v in saved["state_dict"].items()
        if k.startswith("module.student.")
    }
    assert converted["epoch"] == 200 and converted["arch"] == "mobilenetv3_small"
    assert list(converted["state_dict"]) == list(expected)
    assert all(torch.equal(v, converted["state_dict"][k]) for k, v in expected.items())
    assert_same(outputs(load_pretrained(tmp_path / "converted_seed.pth.tar")[0]), forward(tensors, IMAGES))
    assert "left out the teacher" in capsys.readouterr().out
    # what the reference's loader asks of it: all but the classifier is there
    missing = set(make_backbone("mobilenetv3_small")[0].state_dict()) - {k.split(".", 2)[2] for k in expected}
    assert not missing


@pytest.fixture
def verified_here(monkeypatch):
    """What verifies an export runs in this process: that it starts one of its own is the first of these tests."""

    def run(command, **_):
        monkeypatch.setattr(sys, "argv", command[2:])
        with pytest.MonkeyPatch.context() as patch:
            patch.delitem(sys.modules, command[2])  # runpy warns of a module that is there already
            runpy.run_module(command[2], run_name="__main__", alter_sys=True)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(verify_export.subprocess, "run", run)


def test_verify_loads_in_a_new_process(tmp_path, capsys, monkeypatch):
    saved, _, _ = make_moco("mobilenetv3_small")
    torch.save(saved, tmp_path / "in.pth.tar")
    monkeypatch.setattr(verify_export, "load_as", lambda *_: pytest.fail("it loads in this process"))
    words = [str(tmp_path / "in.pth.tar"), str(tmp_path / "out.pth.tar"), "--to", "moco", "--verify"]
    assert run_command(export.main, words) == 0
    assert "verified: it loads in a new process" in capsys.readouterr().out


def test_verify_names_other_features_and_missing_tensors(tmp_path, capsys, verified_here):
    saved, _, _ = make_moco("resnet18")
    torch.save(saved, tmp_path / "in.pth.tar")
    source, out = str(tmp_path / "in.pth.tar"), str(tmp_path / "out.pth.tar")
    assert run_command(export.main, [source, out, "--to", "torchvision", "--verify"]) == 0
    assert "verified: it loads" in capsys.readouterr().out
    broken = torch.load(out, weights_only=True)
    broken["layer4.1.bn2.bias"] += 1
    torch.save(broken, out)
    with pytest.raises(ValueError, match=r"its features differ by .* of the largest: do not use it"):
        verify_export.largest_difference(source, out, "torchvision", "resnet18", "resnet18", "imagenet", "q", False)
    del broken["layer4.1.bn2.bias"]
    torch.save(broken, out)
    with pytest.raises(RuntimeError, match=r"layer4.1.bn2.bias"):
        verify_export.load_as(out, "torchvision", "resnet18", "imagenet", False)


def test_verify_asks_timms_models_at_their_own_size(tmp_path, capsys, verified_here):
    model = timm.create_model("vit_tiny_patch16_384")
    torch.save(model.state_dict(), tmp_path / "in.pth")
    words = ["-a", "timm:vit_tiny_patch16_384", "--to", "timm", "--verify"]
    assert run_command(export.main, [str(tmp_path / "in.pth"), str(tmp_path / "out.pth"), *words]) == 0
    assert "verified: it loads" in capsys.readouterr().out


def test_of_two_networks_with_the_same_names_the_file_says_which_it_is(tmp_path):
    torch.save(make_moco("efficientnet_b0")[0], tmp_path / "in.pth.tar")
    export.export(tmp_path / "in.pth.tar", tmp_path / "out.safetensors", "timm", arch="efficientnet_b0")
    assert load_pretrained(tmp_path / "out.safetensors")[1].arch == "tf_efficientnet_b0"
    torch.save(timm.create_model("efficientnet_b0").state_dict(), tmp_path / "in.pth")
    export.export(tmp_path / "in.pth", tmp_path / "timms.safetensors", "timm", arch="timm:efficientnet_b0")
    assert load_pretrained(tmp_path / "timms.safetensors")[1].arch == "timm:efficientnet_b0"


@pytest.mark.parametrize("head", [False, True])
def test_timms_models_without_a_classifier_are_verified(tmp_path, head):
    model = timm.create_model("eva02_tiny_patch14_224", num_classes=5).eval()
    torch.save(model.state_dict(), tmp_path / "in.pth")
    name, out = "eva02_tiny_patch14_224", str(tmp_path / "out.pth")
    export.export(str(tmp_path / "in.pth"), out, "timm", arch=f"timm:{name}", head=head)
    found = verify_export.compute(verify_export.load_as(out, "timm", name, "imagenet", head), 224)
    model = model if head else timm.create_model(name, num_classes=0).eval()
    model.load_state_dict(torch.load(out, weights_only=True))
    torch.testing.assert_close(found, verify_export.compute(model, 224))


@pytest.mark.parametrize(
    "arch, arguments, message",
    [
        (
            "mobilenetv3_small",
            ["--to", "torchvision"],
            "torchvision has no network that computes the same as mobilenetv3_small",
        ),
        ("mobilenetv3_small", ["--to", "timm"], "timm has no network that computes the same as mobilenetv3_small"),
        ("efficientnet_b1", ["--to", "timm"], "timm has no network that computes the same as efficientnet_b1"),
        ("resnet18", ["--to", "torchvision", "--head"], "can only hold a linear head"),
        ("resnet18", ["-a", "resnet34"], "does not fit resnet34"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(tmp_path, capsys, arch, arguments, message):
    torch.save(make_moco(arch)[0], tmp_path / "in.pth.tar")
    out = tmp_path / "out.pth"
    assert run_command(export.main, [str(tmp_path / "in.pth.tar"), str(out), *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastssl: error: ") and message in line and not out.exists()


def test_paths_and_unknown_formats_from_python(tmp_path):
    torch.save(make_moco("resnet18")[0], tmp_path / "in.pth.tar")
    assert export.export(tmp_path / "in.pth.tar", tmp_path / "out.pth.tar", "moco")[1] == "resnet18"
    with pytest.raises(ValueError, match="no format 'torchvison': choose one of plain, torchvision, timm, moco"):
        export.export(tmp_path / "in.pth.tar", tmp_path / "out.pth", "torchvison")
    assert not (tmp_path / "out.pth").exists()


def test_safetensors_that_torchvision_could_not_load_are_refused(tmp_path):
    model = tv.mnasnet0_5(weights=None)
    torch.save(model.state_dict(), tmp_path / "in.pth")
    with pytest.raises(ValueError, match=r"demands a version, which \.safetensors cannot hold"):
        export.export(tmp_path / "in.pth", tmp_path / "out.safetensors", "torchvision", head=True)
    export.export(tmp_path / "in.pth", tmp_path / "out.pth", "torchvision", head=True)
    model.load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True))


def test_refusals(tmp_path, capsys):
    save_run(tmp_path / "run", stem="cifar")
    source = str(tmp_path / "run")
    (tmp_path / "there.pth").write_text("mine")
    (tmp_path / "empty").mkdir()
    torch.save(tv.mobilenet_v3_small(weights=None).state_dict(), tmp_path / "tv.pth")
    for arguments, message in [
        ([source, str(tmp_path / "there.pth")], "exists: add --force to replace it"),
        ([source, str(tmp_path / "empty"), "--force"], "empty is a folder: name a file in it"),
        ([source, str(tmp_path / "x.onnx")], "cannot write .onnx files, only weights"),
        ([source, str(tmp_path / "x.npz")], "name a .safetensors file or one of .pth .pt .tar .ckpt .bin"),
        ([source, str(tmp_path / "there.pth" / "x.pth")], "or choose another place"),
        ([source, str(tmp_path / "there.pth" / "x.safetensors")], "or choose another place"),
        ([source, str(tmp_path / "x.pth"), "--to", "timm"], "timm has no networks with the cifar stem"),
        ([source, str(tmp_path / "x.safetensors"), "--to", "moco"], "name a .pth.tar file"),
        ([str(tmp_path / "empty"), str(tmp_path / "x.pth")], "holds no usable checkpoint"),
        ([str(tmp_path / "tv.pth"), str(tmp_path / "x.pth"), "--to", "moco"], "expect a classifier called fc"),
    ]:
        assert run_command(export.main, arguments) == 1
        assert message in capsys.readouterr().err
    assert (tmp_path / "there.pth").read_text() == "mine"
    assert run_command(convert.main, ["seed", str(tmp_path / "tv.pth")]) == 1
    assert "is not a SEED checkpoint (state dict): use fastssl convert moco" in capsys.readouterr().err
    assert run_command(convert.main, ["moco", str(tmp_path / "tv.pth")]) == 1
    assert "needs a second path: the file to write" in capsys.readouterr().err
    for unfit in (source, str(tmp_path / "tv.pth")):  # convert itself has no --to
        assert run_command(convert.main, ["moco", unfit, str(tmp_path / "x.pth.tar")]) == 1
        assert ": use fastssl export --to plain" in capsys.readouterr().err


@pytest.fixture
def hubconf():
    spec = importlib.util.spec_from_file_location("hubconf", ROOT / "hubconf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_hub_entry_points(tmp_path, hubconf):
    saved, tensors, forward = make_moco("resnet18")
    torch.save(saved, tmp_path / "moco.pth.tar")
    plain = torch.hub.load(str(ROOT), "encoder", tmp_path / "moco.pth.tar", source="local", verbose=False)
    assert_same(outputs(plain), forward(tensors, IMAGES))
    unit = hubconf.encoder(str(tmp_path / "moco.pth.tar"), with_head=True, normalise=True)
    torch.testing.assert_close(outputs(unit).norm(dim=1), torch.ones(2))
    tensors, forward, _ = make_network("resnet18")
    fc = {f"module.fc.{k}": v for k, v in make_head("linear", 512, 10).items()}
    torch.save({"state_dict": {**{f"module.{k}": v for k, v in tensors.items()}, **fc}}, tmp_path / "best.pth.tar")
    logits = outputs(hubconf.linear_classifier((tmp_path / "best.pth.tar").as_posix(), "resnet18"))
    assert_same(logits, nn.functional.linear(forward(tensors, IMAGES), fc["module.fc.weight"], fc["module.fc.bias"]))


def test_a_url_is_fetched_once(tmp_path, monkeypatch, hubconf):
    saved, _, _ = make_moco("resnet18")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    fetched = []
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda url, path: (fetched.append(url), torch.save(saved, path))
    )
    for _ in range(2):
        hubconf.encoder("https://host/models/moco.pth.tar?x=1")
    assert fetched == ["https://host/models/moco.pth.tar?x=1"]
    hubconf.encoder("https://other/moco.pth.tar")
    assert fetched[1:] == ["https://other/moco.pth.tar"]  # not the first one's file of the same name


def test_a_clone_without_links_has_the_encoders_too(tmp_path):
    """As torch.hub unpacks GitHub's archive: where a link was there is a file with its target."""
    saved, tensors, forward = make_moco("resnet18")
    torch.save(saved, tmp_path / "moco.pth.tar")
    clone = tmp_path / "clone"
    links = [path.name for path in (ROOT / "fastssl").iterdir() if path.is_symlink()]
    for folder in ("fastssl", "data_prep"):
        shutil.copytree(ROOT / folder, clone / folder, ignore=shutil.ignore_patterns("__pycache__", *links))
    shutil.copy(ROOT / "hubconf.py", clone)
    (clone / "fastssl" / "data_prep").write_text("../data_prep")
    code = (
        "import sys, torch\n"
        "network = torch.hub.load(sys.argv[1], 'encoder', sys.argv[2], source='local')\n"
        "import fastssl.data_prep.files as files\n"
        "assert files.__file__.startswith(sys.argv[1]), files.__file__\n"
        "torch.save(network.state_dict(), sys.argv[3])"
    )
    arguments = [str(path) for path in (clone, tmp_path / "moco.pth.tar", tmp_path / "weights.pth")]
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    network = make_backbone("resnet18")[0]
    network.load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True))
    assert_same(outputs(network), forward(tensors, IMAGES))


def test_models_are_listed(capsys):
    assert run_command(models.main, ["mobilenet"]) == 0
    lines = [line.split(maxsplit=3) for line in capsys.readouterr().out.splitlines()]
    assert ["mobilenetv3_small", "1.52", "1024", "small models"] in lines
    assert ["mobilenet_v3_small", "1.52", "1024", "torchvision"] in lines
    assert run_command(models.main, ["regnet_y_128gf"]) == 0
    assert "7392  torchvision" in capsys.readouterr().out
    assert run_command(models.main, ["nothing"]) == 1


def test_an_evaluation_takes_the_run_folder_itself(tmp_path, capsys):
    encoder = save_run(tmp_path / "run", arch="resnet18").moco.encoder_q
    options = finish_options(knn.make_knn_parser().parse_args(["DIR", "--pretrained", str(tmp_path / "run")]))
    backbone = Session(options, RANKS).open_backbone()
    assert_same(outputs(backbone), outputs(encoder.backbone))
    assert "step_000000007.pt: fastssl checkpoint" in capsys.readouterr().err
    options.pretrained = str(tmp_path)
    with pytest.raises(CheckpointError, match="holds no usable checkpoint"):
        Session(options, RANKS).open_backbone()


@pytest.mark.parametrize(
    ("weights", "flags", "has"),
    [
        ((0, 3, 1), [], False),
        ((1, 3, 1), [], True),
        ((1, 0, 0), [], False),  # MoCo's own script refuses it
        ((1, 0, 0), ["--scalar-label"], True),
    ],
)
def test_the_constant_of_the_align_uniform_script(tmp_path, weights, flags, has):
    terms = dict(zip(("contrast_weight", "align_weight", "uniform_weight"), weights))
    save_run(tmp_path / "run", arch="mobilenetv3_small", **terms)
    for name, source in (("old", tmp_path / "run"), ("again", tmp_path / "old.pth.tar")):
        assert run_command(convert.main, ["moco", str(source), str(tmp_path / f"{name}.pth.tar"), *flags]) == 0
        state = torch.load(tmp_path / f"{name}.pth.tar", weights_only=True)["state_dict"]
        assert ("module.scalar_label" in state) is has
        assert not has or (state["module.scalar_label"].dtype, state["module.scalar_label"].shape) == (torch.long, ())
