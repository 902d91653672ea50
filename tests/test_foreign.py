"""Checkpoints of other projects, rebuilt by old_checkpoints.py: features, heads, the account, every refusal."""

import argparse
import os
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision.models as tv
from old_checkpoints import make_head, make_moco, make_network, make_seed
from torch import nn

from fastssl.checkpoint import CheckpointError
from fastssl.export import export
from fastssl.foreign import load_pretrained
from fastssl.moco import MoCo
from fastssl.models import make_encoder
from fastssl.models.encoders import make_backbone

ARCHS = ["resnet18", "mobilenetv3_small", "mobilenetv3_large", "efficientnet_b0", "efficientnet_b1", "vit_tiny"]


def write(tmp_path, value, name="checkpoint_0199.pth.tar"):
    torch.save(value, tmp_path / name)
    return tmp_path / name


def assert_features(backbone, tensors, forward, size=224):
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, expected = backbone(images), forward(tensors, images)
    assert not backbone.training
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("named", [True, False])
def test_moco_checkpoints_give_the_query_features(tmp_path, arch, named):
    saved, tensors, forward = make_moco(arch, head="wide")
    if not named:
        del saved["arch"]
    backbone, report = load_pretrained(write(tmp_path, saved))
    assert_features(backbone, tensors, forward)
    assert (report.arch, report.head, report.dim, report.epoch) == (arch, "wide", 128, 200)
    assert report.kind == "MoCo checkpoint, the query encoder" and report.loaded == len(tensors)
    counted = report.loaded + sum(map(len, report.left_out.values()))
    assert counted == len(saved["state_dict"])  # every tensor is accounted for
    assert list(report.left_out) == ["the key encoder", "the queue", "the head (wide, 128 outputs)"]
    assert str(report).startswith(f"{tmp_path / 'checkpoint_0199.pth.tar'}: MoCo checkpoint, the query encoder, epoch")


def test_align_uniform_moco_has_a_constant_more(tmp_path):
    saved, tensors, forward = make_moco("resnet18", head="linear", scalar_label=True)
    backbone, report = load_pretrained(write(tmp_path, saved), "resnet18")
    assert report.left_out["a constant"] == ["scalar_label"] and report.head == "linear"
    assert_features(backbone, tensors, forward, 64)


def test_the_key_encoder_on_request(tmp_path):
    saved, tensors, forward = make_moco("resnet18")
    key, report = load_pretrained(write(tmp_path, saved), key="k")
    shifted = {k: v + 0.01 if v.is_floating_point() else v for k, v in tensors.items()}
    assert_features(key, shifted, forward, 64)
    assert report.kind == "MoCo checkpoint, the key encoder" and "the query encoder" in report.left_out


@pytest.mark.parametrize("head", ["linear", "simple", "wide", "deep", "dropout", "simclr"])
def test_the_head_on_request(tmp_path, head):
    saved, tensors, forward = make_moco("resnet18", head=head)
    encoder, report = load_pretrained(write(tmp_path, saved), with_head=True)
    fc = {k.removeprefix("module.encoder_q.fc."): v for k, v in saved["state_dict"].items() if "encoder_q.fc." in k}
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        x = forward(tensors, images)
        for name in ("", "0.", "1.", "2.", "3.", "4."):
            if f"{name}weight" not in fc:
                continue
            if name not in ("", "0.", "1."):
                x = x.relu()
            if name == "1.":
                x = nn.functional.batch_norm(
                    x, *(fc["1." + k] for k in ("running_mean", "running_var", "weight", "bias"))
                )
            else:
                x = nn.functional.linear(x, fc[f"{name}weight"], fc[f"{name}bias"])
        torch.testing.assert_close(encoder(images), x, rtol=1e-3, atol=1e-4)
    assert report.head == head and report.dim == 128 and report.loaded == len(tensors) + len(fc)


@pytest.mark.parametrize("arch", ["mobilenetv3_large", "resnet18"])
def test_seed_students(tmp_path, arch):
    saved, tensors, forward = make_seed(arch)
    if arch == "resnet18":  # distilled with small patches too
        saved["state_dict"]["module.small_queue"] = torch.randn(128, 64)
    backbone, report = load_pretrained(write(tmp_path, saved), arch)
    assert_features(backbone, tensors, forward, 96)
    assert report.kind == "SEED checkpoint, the student" and report.head == "simple"
    assert report.left_out["the teacher"] == ["teacher.conv1.weight", "teacher.fc.0.weight"]
    with pytest.raises(CheckpointError, match="no key encoder: leave out --key k"):
        load_pretrained(tmp_path / "checkpoint_0199.pth.tar", key="k")


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model."])
def test_prefixes_of_wrappers(tmp_path, prefix):
    tensors, forward, _ = make_network("resnet18")
    wrapped = {prefix + k: v for k, v in tensors.items()}
    backbone, report = load_pretrained(write(tmp_path, wrapped, "weights.pth"))
    assert_features(backbone, tensors, forward, 64)
    assert (report.arch, report.kind, report.head) == ("resnet18", "state dict", "none")


def test_compiled_parts_inside_and_nested_ddp(tmp_path):
    saved, tensors, forward = make_moco("resnet18")
    inside = {k.replace("encoder_q.", "encoder_q._orig_mod."): v for k, v in saved["state_dict"].items()}
    backbone, _ = load_pretrained(write(tmp_path, {**saved, "state_dict": inside}))
    assert_features(backbone, tensors, forward, 64)
    nested = {k.replace("encoder_q.", "encoder_q.module."): v for k, v in saved["state_dict"].items()}
    simclr = write(tmp_path, {**saved, "arch": "simclr_resnet18", "state_dict": nested}, "simclr.pth.tar")
    assert_features(load_pretrained(simclr)[0], tensors, forward, 64)


def test_what_a_file_says_it_is_but_is_not(tmp_path):
    """GoogLeNet is known here without its auxiliary classifiers alone."""
    saved, _, _ = make_moco("resnet18")
    saved["arch"] = "googlenet"
    saved["state_dict"]["module.encoder_q.aux1.conv.conv.weight"] = torch.zeros(1)
    with pytest.raises(
        CheckpointError, match=r"does not fit googlenet: conv1.conv.weight is missing, .*no architecture"
    ):
        load_pretrained(write(tmp_path, saved))


@pytest.mark.parametrize("name", ["resnet18", "tv_efficientnet_b0", "mobilenet_v3_small", "mnasnet0_5"])
def test_torchvision_state_dicts(tmp_path, name):
    torch.manual_seed(0)
    model = tv.get_model(name.removeprefix("tv_"), weights=None).eval()
    backbone, report = load_pretrained(write(tmp_path, model.state_dict(), "tv.pth"))
    assert report.arch == name and report.left_out == {"the head (linear, 1000 outputs)": ["weight", "bias"]}
    logits, _ = load_pretrained(tmp_path / "tv.pth", name, with_head=True)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(logits(images), model(images))
    assert torch.equal(logits.head(backbone(images)), model(images))


def test_densenets_as_torchvision_publishes_them(tmp_path):
    """Their files have a "." more in the names of layers, and no counters."""
    torch.manual_seed(0)
    model = tv.densenet121(weights=None).eval()
    published = {
        re.sub(r"(denselayer\d+\.(norm|conv))([12])", r"\1.\3", name): tensor
        for name, tensor in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    assert "features.denseblock1.denselayer2.norm.1.weight" in published
    path, images = write(tmp_path, published, "densenet121-a639ec97.pth"), torch.randn(2, 3, 64, 64)
    assert torch.equal(load_pretrained(path, "densenet121", with_head=True)[0](images), model(images))


def test_regnets_load_by_name(tmp_path):
    model = tv.regnet_y_400mf(weights=None)
    path = write(tmp_path, model.state_dict(), "regnet.pth")
    assert load_pretrained(path, "regnet_y_400mf")[1].feature_dim == 440


def test_timm_state_dicts(tmp_path):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 224, 224)
    deit = timm.create_model("deit_tiny_patch16_224").eval()
    backbone, report = load_pretrained(write(tmp_path, {"model": deit.state_dict()}, "deit.pth"))
    assert report.arch == "deit_tiny" and report.feature_dim == 192
    torch.testing.assert_close(backbone(images), deit.forward_head(deit.forward_features(images), pre_logits=True))
    safetensors.torch.save_file(timm.create_model("resnet10t").state_dict(), tmp_path / "model.safetensors")
    assert load_pretrained(tmp_path / "model.safetensors", "timm:resnet10t")[1].feature_dim == 512
    plain = timm.create_model("efficientnet_b0").state_dict()
    with pytest.raises(
        CheckpointError, match=r"tf_efficientnet_b0 and timm:efficientnet_b0, which compute differently"
    ):
        load_pretrained(write(tmp_path, plain, "effnet.pth"))
    assert load_pretrained(tmp_path / "effnet.pth", "timm:efficientnet_b0")[1].loaded == len(plain) - 2


@pytest.mark.parametrize("arch", ["timm:test_convnext", "timm:efficientnet_b0"])  # of which the latter has a twin
def test_our_files_of_timms_networks_need_no_name(arch, tmp_path):
    tensors = make_backbone(arch)[0].state_dict()
    ours = {f"encoder_q.backbone.{name}": tensor for name, tensor in tensors.items()}
    path = write(tmp_path, {"config": {"arch": arch, "stem": "imagenet"}, "model": ours}, "step_000000001.pt")
    assert load_pretrained(path)[1].arch == arch
    export(str(path), str(tmp_path / "out.safetensors"))
    assert load_pretrained(tmp_path / "out.safetensors")[1].arch == arch


def test_a_network_that_this_timm_lacks(tmp_path):
    named = {"arch": "timm:no_such_net", "state_dict": {"module.stem.weight": torch.zeros(3)}}
    with pytest.raises(ValueError, match="timm has no model 'no_such_net'"):
        load_pretrained(write(tmp_path, named))


def test_swav_and_linear_classifiers(tmp_path):
    tensors, forward, _ = make_network("resnet18")
    swav = {**tensors, "projection_head.0.weight": torch.randn(8, 512), "prototypes.weight": torch.randn(4, 8)}
    backbone, report = load_pretrained(write(tmp_path, {"module." + k: v for k, v in swav.items()}, "swav.pth.tar"))
    assert list(report.left_out) == ["SwAV's projection head", "SwAV's prototypes"]
    fc = {f"module.fc.{k}": v for k, v in make_head("linear", 512, 100).items()}
    linear = {"epoch": 100, "state_dict": {**{"module." + k: v for k, v in tensors.items()}, **fc}, "best_acc1": 60.0}
    backbone, report = load_pretrained(write(tmp_path, linear, "model_best.pth.tar"), "resnet18", with_head=True)
    assert (report.head, report.dim) == ("linear", 100)
    assert backbone(torch.randn(2, 3, 32, 32)).shape == (2, 100)
    transfer = {k.replace("fc.", "fc.1."): v for k, v in linear["state_dict"].items()}
    classifier, report = load_pretrained(write(tmp_path, transfer, "transfer.pth"), with_head=True)
    assert report.head == "normalised linear"
    images = torch.randn(2, 3, 32, 32)
    unit = nn.functional.normalize(forward(tensors, images))
    expected = nn.functional.linear(unit, fc["module.fc.weight"], fc["module.fc.bias"])
    torch.testing.assert_close(classifier(images), expected, rtol=1e-3, atol=1e-4)


SIDE = {"0.weight": torch.randn(8, 512), "0.bias": torch.randn(8)}  # of any network beside an encoder


def below(**networks):
    """One state dict of several networks."""
    return {f"{name}.{k}": v for name, tensors in networks.items() for k, v in tensors.items()}


@pytest.mark.parametrize(
    ("names", "sides", "left_out"),
    [
        (("base_encoder", "momentum_encoder"), ["predictor"], {"the key encoder", "the predictor"}),
        (
            ("backbone", "momentum_backbone"),
            ["projector", "predictor", "momentum_projector", "classifier"],
            {"the momentum backbone", "the projector", "the predictor", "the momentum projector",
             "the classifier trained beside it", "the queue"},
        ),
        (
            ("backbone", "backbone_momentum"),
            ["projection_head", "prediction_head", "projection_head_momentum"],
            {"the momentum backbone", "the projector", "the predictor", "the momentum projector", "the loss's memory"},
        ),
    ],
    ids=["MoCo v3", "solo-learn", "lightly"],
)  # fmt: skip
def test_encoders_of_other_self_supervised_projects(tmp_path, names, sides, left_out):
    torch.manual_seed(0)
    query, key = tv.resnet18().eval(), tv.resnet18().eval()
    query.fc = key.fc = nn.Identity()
    saved = below(**dict(zip(names, (query.state_dict(), key.state_dict()))), **dict.fromkeys(sides, SIDE))
    if "the queue" in left_out:
        saved |= {"queue": torch.randn(8, 16), "queue_ptr": torch.zeros(1)}
    if "the loss's memory" in left_out:  # lightly takes the network apart
        saved = {k: v for k, v in saved.items() if not k.startswith(names)} | {"criterion.bank": torch.randn(8, 16)}
        parts = [nn.Sequential(*network.children()).state_dict() for network in (query, key)]
        saved |= below(**dict(zip(names, parts)))
    path, images = write(tmp_path, {"state_dict": saved, "epoch": 3}, "x.ckpt"), torch.randn(2, 3, 64, 64)
    backbone, report = load_pretrained(path)
    assert set(report.left_out) == left_out and report.arch == "resnet18"
    torch.testing.assert_close(backbone(images), query(images))
    torch.testing.assert_close(load_pretrained(path, key="k")[0](images), key(images))


def test_what_nobody_knows_beside_a_backbone_is_refused(tmp_path):
    saved = below(backbone=tv.resnet18().state_dict(), mystery=SIDE)
    with pytest.raises(CheckpointError, match=r"tar has a tensor 'mystery\.0\.weight' unknown in self-supervised"):
        load_pretrained(write(tmp_path, saved))


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_our_own_checkpoints(tmp_path, stem):
    torch.manual_seed(0)
    moco = MoCo(make_encoder("resnet18", head="wide", dim=16, stem=stem), 16, 32, 0)
    saved = {"format": 1, "step": 3, "config": {"arch": "resnet18", "stem": stem}, "model": moco.state_dict()}
    encoder, report = load_pretrained(write(tmp_path, saved, "step_3.pt"), with_head=True)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(encoder(images), moco.encoder_q.eval()(images))
    assert (report.stem, report.head, report.dim) == (stem, "wide", 16)
    assert report.kind == "fastssl checkpoint, the query encoder"
    bare = write(tmp_path, moco.encoder_q.backbone.state_dict(), "bare.pth")
    assert load_pretrained(bare)[1].stem == stem  # a 3x3 stem tells the CIFAR ResNet by its shape


def test_safetensors_with_and_without_counters(tmp_path):
    tensors, forward, _ = make_network("mobilenetv3_small")
    without = {k: v for k, v in tensors.items() if not k.endswith("num_batches_tracked")}
    safetensors.torch.save_file(without, tmp_path / "a.safetensors")
    backbone, report = load_pretrained(tmp_path / "a.safetensors", "mobilenetv3_small")
    assert_features(backbone, tensors, forward, 96)
    assert report.notes == ["the file lacks num_batches_tracked, so it starts at 0"]


def test_arguments_and_numpy_numbers_of_old_checkpoints_are_read(tmp_path):
    saved, tensors, forward = make_moco("resnet18")
    saved["args"] = argparse.Namespace(lr=0.03, schedule=[120, 160], gpu=None)
    saved["best_acc1"] = np.float64(67.5)
    saved["steps"] = np.int64(3)
    for name, options in [("new.pth.tar", {}), ("old.pth.tar", {"_use_new_zipfile_serialization": False})]:
        torch.save(saved, tmp_path / name, **options)
        assert_features(load_pretrained(tmp_path / name)[0], tensors, forward, 64)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-2), (torch.bfloat16, 2e-1)])
def test_halved_checkpoints_are_loaded_as_float32(tmp_path, dtype, tolerance):
    tensors, forward, _ = make_network("resnet18")
    halved = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    backbone, _ = load_pretrained(write(tmp_path, halved, "half.pth"))
    assert all(p.dtype == torch.float32 for p in backbone.parameters())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        ours, expected = backbone(images), forward(tensors, images)
    assert 0 < (ours - expected).abs().max() < tolerance * expected.abs().max()


class Unknown:
    pass


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize("poison", [Unknown(), Evil(), pickle.loads])
def test_code_in_a_checkpoint_is_refused(tmp_path, capsys, poison):
    saved, _, _ = make_moco("resnet18")
    path = write(tmp_path, {**saved, "extra": poison})
    with pytest.raises(
        CheckpointError, match=r"checkpoint_0199.pth.tar holds \S+, which would run as code if it were loaded"
    ):
        load_pretrained(path)
    assert "code ran" not in capsys.readouterr().out


def test_blocked_modules_and_whole_programs_are_refused_without_advice_to_run_them(tmp_path):
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as script:
        for name in (
            "constants.pkl",
            "data.pkl",
            "version",
        ):  # the first tells TorchScript's archives from torch.save's
            script.writestr(f"script/{name}", b"3\n" if name == "version" else b"")
    blocked = write(tmp_path, {"state_dict": {}, "extra": os.system}, "blocked.pth")
    for path, what in ((blocked, r"\S+\.system"), (tmp_path / "script.pt", "TorchScript")):
        with warnings.catch_warnings(), pytest.raises(CheckpointError, match=f"holds {what}, which .* code") as error:
            warnings.simplefilter("ignore", UserWarning)  # torch's, that it dispatches to torch.jit.load
            load_pretrained(path)
        assert "weights_only" not in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda s: s.pop("module.encoder_q.layer1.0.conv1.weight"),
            r"does not fit resnet18: layer1.0.conv1.weight is missing; ",
        ),
        (
            lambda s: s.update({"module.encoder_q.extra": torch.zeros(1)}),
            r"does not fit resnet18: extra is unexpected; ",
        ),
        (
            lambda s: s.update({"module.encoder_q.bn1.bias": torch.zeros(3)}),
            r"bn1.bias has shape \(3,\), not \(64,\); ",
        ),
        (
            lambda s: s.update({"module.predictor.0.weight": torch.zeros(1)}),
            r"has a tensor 'predictor.0.weight' unknown ",
        ),
        (lambda s: s["module.encoder_q.bn1.bias"].fill_(float("nan")), r"encoder_q.bn1.bias holds values that are not"),
        (lambda s: s.update({"module.student.x": torch.zeros(1)}), r"tar holds encoders of MoCo and SEED at once"),
    ],
)
def test_nothing_unexplained_is_loaded(tmp_path, change, message):
    saved, _, _ = make_moco("resnet18")
    change(saved["state_dict"])
    with pytest.raises(CheckpointError, match=message) as error:
        load_pretrained(write(tmp_path, saved), "resnet18")
    assert "\n" not in str(error.value)


def test_a_wrong_architecture_is_told_the_right_one(tmp_path):
    saved, _, _ = make_moco("resnet18")
    with pytest.raises(
        CheckpointError, match=r"does not fit resnet50: layer1.0.conv1.weight has shape .* it fits resnet18$"
    ):
        load_pretrained(write(tmp_path, saved), "resnet50")
    with pytest.raises(ValueError, match="unknown architecture 'resnet19'"):
        load_pretrained(tmp_path / "checkpoint_0199.pth.tar", "resnet19")
    torch.save(tv.efficientnet_b0(weights=None).state_dict(), tmp_path / "tv.pth")
    with pytest.raises(CheckpointError, match=r"it fits tv_efficientnet_b0$"):
        load_pretrained(tmp_path / "tv.pth", "efficientnet_b0")
    torch.save({"a": torch.zeros(1)}, tmp_path / "nothing.pth")
    with pytest.raises(CheckpointError, match=r"\(state dict of a\) fits no architecture known here: name one with -a"):
        load_pretrained(tmp_path / "nothing.pth")
    with pytest.raises(CheckpointError, match=r"no architecture known here has these layers: a$"):
        load_pretrained(tmp_path / "nothing.pth", "resnet18")


def test_files_that_hold_no_weights(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_pretrained(tmp_path / "missing.pth")
    with pytest.raises(CheckpointError, match="is a folder: name a checkpoint in it"):
        load_pretrained(tmp_path)
    for value, message in [
        ([1, 2], "holds a list, not named weights"),
        ({"epoch": 3, "optimizer": {}}, "holds no weights under state_dict, model, .*: it holds epoch, optimizer"),
        ({}, "it holds nothing"),
        (OrderedDict(state_dict={}), "holds no weights"),
        ({"w": torch.zeros(2, 2, device="meta")}, "w is sparse or has no values"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            load_pretrained(write(tmp_path, value))
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("no weights in here" * 10)
        with pytest.raises(CheckpointError, match="is damaged or not a"):
            load_pretrained(tmp_path / name)


def test_flipped_bits_are_noticed(tmp_path):
    path = write(tmp_path, make_moco("resnet18")[0])
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"is damaged: .* fails its checksum"):
        load_pretrained(path)


def test_no_head_and_unknown_heads(tmp_path):
    tensors, _, _ = make_network("resnet18")
    path = write(tmp_path, dict(tensors), "bare.pth")
    with pytest.raises(CheckpointError, match="has no head: leave out --head to use the 512 features"):
        load_pretrained(path, with_head=True)
    odd = {**tensors, "fc.0.weight": torch.randn(7, 512), "fc.0.bias": torch.randn(7)}
    path = write(tmp_path, odd, "odd.pth")
    assert load_pretrained(path)[1].left_out == {"the head (unknown)": ["0.weight", "0.bias"]}
    with pytest.raises(CheckpointError, match=r"an unknown head \(0.weight, 0.bias\)"):
        load_pretrained(path, with_head=True)
