"""Checkpoints of SimSiam, DINO and MoCo v3's ViTs, by the names of their tensors."""

import argparse

import pytest
import timm
import torch
import torchvision.models as tv
from torch import nn

from fastssl.checkpoint import CheckpointError
from fastssl.foreign import load_pretrained
from fastssl.models.encoders import make_backbone

HEAD = {"mlp.0.weight": torch.randn(8, 192), "mlp.0.bias": torch.randn(8), "last_layer.weight_v": torch.randn(3, 8)}
SIDE = {"0.weight": torch.randn(8, 16), "1.weight": torch.randn(8)}


def below(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def write(tmp_path, value):
    torch.save(value, tmp_path / "checkpoint.pth")
    return tmp_path / "checkpoint.pth"


def make_vit(seed):
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()


def assert_same(module, expected, size=224):
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(module(images), expected(images))


def test_simsiam(tmp_path):
    torch.manual_seed(0)
    network = tv.resnet18()
    network.fc = nn.Identity()
    projector = below("module.encoder.fc.", SIDE)
    state = {**below("module.encoder.", network.state_dict()), **projector, **below("module.predictor.", SIDE)}
    backbone, report = load_pretrained(write(tmp_path, {"epoch": 100, "arch": "resnet18", "state_dict": state}))
    assert_same(backbone, network.eval(), 64)
    assert (report.kind, report.head) == ("SimSiam checkpoint, the encoder", "unknown")
    assert set(report.left_out) == {"the predictor", "the head (unknown)"}
    assert report.loaded + sum(map(len, report.left_out.values())) == len(state)
    with pytest.raises(CheckpointError, match="no key encoder, only the encoder"):
        load_pretrained(tmp_path / "checkpoint.pth", key="k")


@pytest.mark.parametrize("joined", [False, True])
def test_dino_has_a_student_and_a_teacher(tmp_path, joined):
    networks = {"student": make_vit(0), "teacher": make_vit(1)}
    states = {n: {**below("backbone.", net.state_dict()), **below("head.", HEAD)} for n, net in networks.items()}
    states["student"] = below("module.", states["student"])
    saved = {**states, "epoch": 3, "args": argparse.Namespace(arch="vit_tiny"), "dino_loss": {"center": torch.ones(3)}}
    if joined:
        saved = {"state_dict": {k: v for n, state in states.items() for k, v in below(f"{n}.", state).items()}}
    path = write(tmp_path, saved)
    for key, name, other in (("q", "student", "teacher"), ("k", "teacher", "student")):
        backbone, report = load_pretrained(path, key=key)
        assert_same(backbone, networks[name])
        assert (report.kind, report.arch) == (f"DINO checkpoint, the {name}", "deit_tiny")
        assert set(report.left_out) - {"the tensors of 'dino_loss'"} == {f"the {other}", "the head (unknown)"}


def test_vits_of_mocov3(tmp_path):
    backbone, _, _ = make_backbone("vit_base")
    encoder = {**backbone.state_dict(), **below("head.", SIDE)}
    state = {k: v for n in ("base", "momentum") for k, v in below(f"module.{n}_encoder.", encoder).items()}
    state |= below("module.predictor.", SIDE)
    loaded, report = load_pretrained(write(tmp_path, {"arch": "vit_base", "state_dict": state}))
    assert_same(loaded, backbone.eval())
    assert (report.kind, report.arch) == ("MoCo v3 checkpoint, the query encoder", "vit_base")
    assert set(report.left_out) == {"the key encoder", "the predictor", "the head (unknown)"}


def test_an_encoder_inside_a_network_is_not_simsiams(tmp_path):
    """torchvision's ViTs have one."""
    path = write(tmp_path, below("module.", tv.vit_b_16().state_dict()))
    assert load_pretrained(path)[1].kind == "state dict"
