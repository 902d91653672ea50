"""Checkpoints of solo-learn and lightly, by the names that their classes give: each network is left out by name."""

import pytest
import torch
import torchvision.models as tv
from torch import nn

from fastssl.checkpoint import CheckpointError
from fastssl.export import export
from fastssl.foreign import load_into, load_pretrained
from fastssl.models import make_encoder

SIDE = {"0.weight": torch.randn(8, 512), "0.bias": torch.randn(8)}  # of any network beside an encoder
CLASSIFIER = {"weight": torch.randn(10, 512), "bias": torch.randn(10)}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def below(**networks):
    """One state dict of several networks."""
    return {f"{name}.{k}": v for name, tensors in networks.items() for k, v in tensors.items()}


def make_resnet(seed, padding=None):
    """A ResNet-18 without its classifier; with a padding, and the stem for CIFAR."""
    torch.manual_seed(seed)
    network = tv.resnet18()
    network.fc = nn.Identity()
    if padding is not None:
        network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, 1, padding, bias=False), nn.Identity()
    return network.eval()


def write(tmp_path, state):
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "x.ckpt")
    return tmp_path / "x.ckpt"


@pytest.mark.parametrize("padding", [1, 2])
def test_solo_learns_stem_for_cifar_pads_two_pixels(tmp_path, padding):
    query, key = make_resnet(0, padding), make_resnet(1, padding)
    state = below(backbone=query.state_dict(), momentum_backbone=key.state_dict(), projector=SIDE)
    if padding == 2:  # as all of solo-learn's checkpoints have it
        state |= below(classifier=CLASSIFIER)
    path = write(tmp_path, state)
    for which, expected in (("q", query), ("k", key)):
        backbone, report = load_pretrained(path, key=which)
        assert torch.equal(backbone(IMAGES), expected(IMAGES))
        assert report.stem == "cifar" and ("pads images by 2 pixels" in str(report)) == (padding == 2)
        assert report.kind.startswith("solo-learn checkpoint") == (padding == 2)


def test_what_cannot_keep_that_padding_says_so(tmp_path):
    path = write(tmp_path, below(backbone=make_resnet(0, 2).state_dict(), classifier=CLASSIFIER))
    with pytest.raises(ValueError, match="weights alone cannot say that solo-learn's first convolution pads 2 pixels"):
        export(path, tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()
    notes = load_into(path, make_encoder("resnet18", stem="cifar"), "resnet18", "cifar")
    assert "solo-learn's first convolution pads images of CIFAR by 2 pixels, where this run's pads 1" in notes


@pytest.mark.parametrize(
    ("query", "key", "sides", "left_out"),
    [
        ("backbone", "momentum_backbone", ["head", "momentum_head", "classifier", "momentum_classifier"],
         {"the projector", "the momentum projector", "the classifier trained beside it"}),
        ("backbone", None, ["projector", "prototypes", "predictor2", "transformer_encoder", "classifier"],
         {"the projector", "the prototypes", "the predictor", "the classifier trained beside it"}),
        ("backbone", "teacher_backbone",
         ["projection_head", "prediction_head", "teacher_projection_head", "online_classifier"],
         {"the projector", "the predictor", "the momentum projector", "the classifier trained beside it"}),
        ("backbone", "key_backbone", ["projection_head", "key_projection_head", "queues", "memory_bank"],
         {"the projector", "the momentum projector", "the queue", "the loss's memory"}),
        ("student_backbone", "teacher_backbone", ["student_head", "teacher_head"],
         {"the student's projector", "the momentum projector"}),
        ("backbone", None, ["projection_head", "student_backbone", "student_projection_head"],
         {"the projector", "the student's backbone", "the student's projector"}),
    ],
    ids=["solo-learn DINO", "solo-learn's others", "lightly BYOL", "lightly MoCo", "lightly DINO", "its average"],
)  # fmt: skip
def test_what_lies_beside_the_backbone(tmp_path, query, key, sides, left_out):
    networks = {query: make_resnet(0), **({key: make_resnet(1)} if key else {})}
    state = below(**{name: net.state_dict() for name, net in networks.items()}, **dict.fromkeys(sides, SIDE))
    path = write(tmp_path, state)
    backbone, report = load_pretrained(path)
    assert torch.equal(backbone(IMAGES), networks[query](IMAGES))
    assert left_out <= set(report.left_out) and len(report.left_out) == len(left_out) + bool(key)
    assert report.loaded + sum(map(len, report.left_out.values())) == len(state)
    if key:
        assert torch.equal(load_pretrained(path, key="k")[0](IMAGES), networks[key](IMAGES))
    else:
        with pytest.raises(CheckpointError, match="has no key encoder"):
            load_pretrained(path, key="k")


def test_solo_learns_queue_of_neighbours(tmp_path):
    state = below(backbone=make_resnet(0).state_dict(), projector=SIDE, classifier=CLASSIFIER)
    queue = {
        "queue": torch.randn(16, 8),
        "queue_ptr": torch.zeros(1),
        "queue_y": torch.zeros(16),
        "queue_index": torch.zeros(16),
    }
    report = load_pretrained(write(tmp_path, {**state, **queue}))[1]
    assert report.left_out["the queue"] == list(queue) and report.stem == "imagenet" and not report.notes
