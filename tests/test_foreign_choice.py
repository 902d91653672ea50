"""Networks with the same names and shapes that compute differently: what the file says decides, or is said."""

from functools import cache

import pytest
import safetensors.torch
import timm
import torch

from fastssl.checkpoint import CheckpointError
from fastssl.distributed import Ranks
from fastssl.eval.knn import make_knn_parser
from fastssl.eval.options import finish_options
from fastssl.eval.session import Session
from fastssl.export import export
from fastssl.foreign import fit, load_into, load_pretrained
from fastssl.foreign.layout import Layout
from fastssl.models import make_encoder

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def blurred():
    """A ResNet-18 that blurs before it strides."""
    torch.manual_seed(0)
    return timm.create_model("resnetblur18", num_classes=0).eval()


def assert_same(module, expected, images=IMAGES):
    with torch.no_grad():
        torch.testing.assert_close(module(images), expected(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["resnetblur18", "resnetblur18.in1k", "timm:resnetblur18"])
def test_the_name_in_a_file_decides(tmp_path, blurred, name):
    torch.save({"arch": name, "state_dict": blurred.state_dict()}, tmp_path / "x.pth.tar")
    backbone, report = load_pretrained(tmp_path / "x.pth.tar")
    assert report.arch == "timm:resnetblur18"
    assert_same(backbone, blurred)


def test_the_name_in_hugging_faces_file_beside_it_decides(tmp_path, blurred):
    torch.save(blurred.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"architecture": "resnetblur18"}')
    assert load_pretrained(tmp_path / "pytorch_model.bin")[1].arch == "timm:resnetblur18"
    for other in (b"[]", b'{"architecture": 1}', b"\xff{"):
        (tmp_path / "config.json").write_bytes(other)
        assert not load_pretrained(tmp_path / "pytorch_model.bin", "resnet18")[1].notes


@pytest.mark.parametrize("arch", [None, "resnet18"])
def test_a_name_that_the_tensors_contradict_is_said(tmp_path, arch):
    encoder = timm.create_model("resnet18", num_classes=0)
    torch.save({"arch": "resnet50", "state_dict": encoder.state_dict()}, tmp_path / "x.pth.tar")
    report = load_pretrained(tmp_path / "x.pth.tar", arch)[1]
    assert report.arch == "resnet18"
    assert report.notes == ["the file says resnet50, but its tensors are those of resnet18"]


def test_timms_own_efficientnets_are_told_by_their_name_too(tmp_path):
    model = timm.create_model("efficientnet_b0", num_classes=0).eval()
    torch.save({"arch": "efficientnet_b0", "state_dict": model.state_dict()}, tmp_path / "x.pth.tar")
    backbone, report = load_pretrained(tmp_path / "x.pth.tar")
    assert report.arch == "timm:efficientnet_b0"
    assert_same(backbone, model)


def test_another_arch_than_the_files_is_said(tmp_path, blurred):
    torch.save({"arch": "resnetblur18", "state_dict": blurred.state_dict()}, tmp_path / "x.pth.tar")
    note = "the file means timm:resnetblur18, which computes differently from resnet18"
    assert load_pretrained(tmp_path / "x.pth.tar", "resnet18")[1].notes == [note]
    assert note in load_into(tmp_path / "x.pth.tar", make_encoder("resnet18"), "resnet18", "imagenet")
    assert not load_pretrained(tmp_path / "x.pth.tar", "timm:resnetblur18")[1].notes
    torch.save({"arch": "resnet18", "state_dict": blurred.state_dict()}, tmp_path / "x.pth.tar")
    assert not load_pretrained(tmp_path / "x.pth.tar", "timm:resnet18")[1].notes  # the same network


def test_an_export_says_what_its_file_cannot(tmp_path, blurred):
    torch.save({"arch": "resnetblur18", "state_dict": blurred.state_dict()}, tmp_path / "x.pth.tar")
    for name, notes in (
        ("a.pth", ["{} cannot say that it is timm:resnetblur18: a .safetensors file can"]),
        ("a.safetensors", []),
    ):
        report, _ = export(tmp_path / "x.pth.tar", tmp_path / name)
        assert report.notes == [note.format(tmp_path / name) for note in notes]
    assert_same(load_pretrained(tmp_path / "a.safetensors")[0], blurred)


@pytest.mark.parametrize(("arch", "noted"), [("mobilenetv3_small", 1), ("resnet18", 0)])
def test_an_export_says_where_no_shape_tells_the_stem(tmp_path, arch, noted):
    tensors = make_encoder(arch, stem="cifar").backbone.state_dict()
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", {"arch": arch, "stem": "cifar"})
    notes = export(tmp_path / "x.safetensors", tmp_path / "x.pth")[0].notes
    assert [note.endswith(f"it is {arch} --stem cifar: a .safetensors file can") for note in notes] == [True] * noted


def test_the_stem_that_no_shape_tells_can_be_given(tmp_path, image_folder):
    torch.manual_seed(0)
    own = make_encoder("mobilenetv3_small", stem="cifar").backbone.eval()
    torch.save(own.state_dict(), tmp_path / "x.pth")
    assert load_pretrained(tmp_path / "x.pth", stem="cifar")[1].arch == "mobilenetv3_small"
    words = [str(image_folder), "--stem", "cifar", "--pretrained", str(tmp_path / "x.pth"), "--image-size", "32"]
    session = Session(finish_options(make_knn_parser().parse_args(words)), Ranks(0, 1, torch.device("cpu")))
    assert_same(session.open_backbone(), own)


def test_a_given_architecture_has_the_stem_that_fits(tmp_path):
    torch.save(make_encoder("resnet18", stem="cifar").backbone.state_dict(), tmp_path / "x.pth")
    assert load_pretrained(tmp_path / "x.pth", "resnet18")[1].stem == "cifar"
    with pytest.raises(CheckpointError, match="does not fit resnet34: "):
        load_pretrained(tmp_path / "x.pth", "resnet34")


@pytest.mark.parametrize("arch", ["swav_resnet50w2", "tf_efficientnet_b0"])  # which replace weights they have made
def test_few_architectures_are_built_to_recognise_a_bare_file(monkeypatch, arch):
    own, built = fit.signature.__wrapped__, []
    monkeypatch.setattr(fit, "signature", cache(lambda *which: built.append(which) or own(*which)))
    tensors = {name: torch.empty(shape, device="meta") for name, shape in own(arch).shapes.items()}
    assert fit.fitting_architectures(Layout("", tensors, None, {})) == [(arch, "imagenet")]
    assert len(built) < 15  # of a hundred


def test_mocov3s_small_vit_has_more_heads_than_dinos(tmp_path, monkeypatch):
    torch.manual_seed(0)
    networks = {
        heads: timm.create_model("vit_small_patch16_224", num_classes=0, num_heads=heads).eval() for heads in (6, 12)
    }
    images = torch.randn(1, 3, 224, 224)
    for prefix, heads, arch in (
        ("module.base_encoder.", 12, "mocov3_vit_small"),
        ("teacher.backbone.", 6, "timm:vit_small_patch16_224"),
    ):
        state = {prefix + k: v for k, v in networks[heads].state_dict().items()}
        torch.save({"arch": "vit_small", "state_dict": state}, tmp_path / "x.pth")
        key = "k" if heads == 6 else "q"
        backbone, report = load_pretrained(tmp_path / "x.pth", key=key)
        assert (report.arch, report.notes) == (arch, [])
        assert_same(backbone, networks[heads], images)
    notes = load_pretrained(tmp_path / "x.pth", "mocov3_vit_small", key="k")[1].notes
    assert notes == ["the file means timm:vit_small_patch16_224, which computes differently from mocov3_vit_small"]
    torch.save(networks[6].state_dict(), tmp_path / "x.pth")
    monkeypatch.setattr(fit, "list_architectures", lambda: ["mocov3_vit_small", "resnet18"])  # all of them take seconds
    with pytest.raises(CheckpointError, match="fits mocov3_vit_small and timm:vit_small_patch16_224, which compute"):
        load_pretrained(tmp_path / "x.pth")
