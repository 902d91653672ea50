"""The small models compute what their formulas say (written again in old_checkpoints.py) and what timm computes."""

import copy

import old_checkpoints
import pytest
import timm
import torch
from old_checkpoints import NETWORKS, make_network
from torch import nn

from fastssl.models import list_architectures, make_encoder, split_batchnorm
from fastssl.models.batchnorm import convert_sync_batchnorm
from fastssl.models.encoders import make_backbone, make_classifier, source_of

SMALL = [name for name in NETWORKS if not name.startswith("resnet")]


def load(arch, tensors):
    backbone, _, _ = make_backbone(arch)
    backbone.load_state_dict(tensors, strict=True)
    return backbone.eval()


@pytest.mark.parametrize(
    "arch, size", [(arch, 224) for arch in SMALL] + [("mobilenetv3_small", 96), ("efficientnet_b1", 96)]
)
def test_features_and_names_are_those_of_the_formulas(arch, size):
    tensors, forward, features = make_network(arch)
    backbone = load(arch, tensors)
    assert list(backbone.state_dict()) == list(tensors)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        ours, expected = backbone(images), forward(tensors, images)
    assert ours.shape == (2, features)
    assert (expected[0] - expected[1]).abs().max() > 1e-2 * expected.abs().max()  # the images matter
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def normalise_by_the_batch(t, name, x, eps=1e-5):
    """Batch norm in training, written out."""
    weight, bias = (t[f"{name}.{k}"][:, None, None] for k in ("weight", "bias"))
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    return (x - mean) / (var + eps).sqrt() * weight + bias


def switch_dropout_off(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "drop") and hasattr(module.drop, "p"):
            module.drop.p = 0.0


def assert_gradients(ours, expected, tolerance):
    """Each within `tolerance` of the largest gradient of its layer; of those that are truly 0 nothing else is left."""
    layers = {}
    for name, gradient in expected.items():
        layers.setdefault(name.rpartition(".")[0], []).append(float(gradient.abs().max()))
    for name, gradient in ours.items():
        error = float((gradient - expected[name]).abs().max())
        assert error <= tolerance * max(layers[name.rpartition(".")[0]]), (name, error)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("arch", ["mobilenetv3_small", "mobilenetv3_large", "efficientnet_b0", "vit_tiny"])
def test_gradients_are_those_of_the_formulas(arch, training, monkeypatch):
    """In float64. A shift before a convolution that batch norm follows has no gradient while training."""
    if training:
        monkeypatch.setattr(old_checkpoints, "batch_norm", normalise_by_the_batch)
    tensors, forward, features = make_network(arch)
    tensors = {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}
    backbone = load(arch, tensors).double().train(training)
    switch_dropout_off(backbone)
    size = 224 if arch == "vit_tiny" else 64
    images, weight = torch.randn(3, 3, size, size).double(), torch.randn(3, features).double()
    (backbone(images) * weight).sum().backward()
    ours = {n: p.grad for n, p in backbone.named_parameters() if p.requires_grad}
    leaves = {n: tensors[n].clone().requires_grad_() for n in ours}
    output = (forward({**tensors, **leaves}, images) * weight).sum()
    expected = dict(zip(leaves, torch.autograd.grad(output, list(leaves.values()))))
    assert_gradients(ours, expected, 1e-9 if "mobile" not in arch else 1e-6)  # torch's hardsigmoid: a float32 1/6
    if arch == "efficientnet_b0":
        shift = ours["_blocks.4._bn2.bias"].abs().max() / ours["_blocks.4._bn2.weight"].abs().max()
        assert (shift < 1e-12) == training


def test_gradients_of_b0_are_timms():
    torch.manual_seed(0)
    other = timm.create_model("tf_efficientnet_b0", num_classes=0).double().train()
    tensors, _, _ = make_network("efficientnet_b0")
    backbone = load("efficientnet_b0", tensors).double().train()
    other.load_state_dict(dict(zip(other.state_dict(), tensors.values())), strict=True)
    images, weight = torch.randn(2, 3, 224, 224).double(), torch.randn(2, 1280).double()
    for model in (backbone, other):
        switch_dropout_off(model)
        (model(images) * weight).sum().backward()
    expected = dict(zip((n for n, _ in backbone.named_parameters()), (p.grad for p in other.parameters())))
    assert_gradients({n: p.grad for n, p in backbone.named_parameters()}, expected, 1e-9)


@pytest.mark.parametrize("number, nominal", [(0, 224), (1, 240), (2, 260), (3, 300)])
def test_efficientnets_are_timms_at_their_nominal_size(number, nominal):
    torch.manual_seed(number)
    other = timm.create_model(f"tf_efficientnet_b{number}", num_classes=0).eval()
    tensors, _, _ = make_network(f"efficientnet_b{number}")
    backbone = load(f"efficientnet_b{number}", tensors)
    names = list(other.state_dict())  # both projects order their layers as they run
    assert [v.shape for v in other.state_dict().values()] == [v.shape for v in tensors.values()]
    other.load_state_dict(dict(zip(names, tensors.values())), strict=True)
    images = torch.randn(1, 3, nominal, nominal)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), other(images), rtol=1e-3, atol=1e-4)
        if number:  # at 224 pixels timm pads for 224, the small-model project for the nominal size
            images = torch.randn(1, 3, 224, 224)
            assert (backbone(images) - other(images)).abs().max() > 1e-3


def test_b0_regularises_as_its_recipe_says():
    net = make_classifier("efficientnet_b0").train()
    assert [round(block.drop.p, 4) for block in net._blocks[:3]] == [0, 0.0125, 0.025]
    assert net._dropout.p == 0.2 and net._bn0.momentum == 0.01 and net._bn0.eps == 1e-3
    assert [make_classifier(f"efficientnet_b{i}")._dropout.p for i in (1, 2, 3)] == [0.2, 0.3, 0.3]


def test_mobilenetv3_starts_as_its_recipe_says():
    torch.manual_seed(0)
    net = make_classifier("mobilenetv3_small")
    depthwise = net.features[9].conv[3].weight  # 288 channels, 5 x 5: fan-out counts all of them
    assert abs(depthwise.std().item() / (2 / (25 * 288)) ** 0.5 - 1) < 0.05
    assert abs(net.classifier[0].weight.std().item() / 0.01 - 1) < 0.05 and net.fc.bias.abs().max() == 0
    assert net.classifier[2].p == 0.2


@pytest.mark.parametrize("head", ["linear", "simple", "deep", "dropout", "wide"])
def test_heads_of_mobilenetv3_end_in_its_own_classifier_except_the_wide_one(head):
    torch.manual_seed(0)
    *_, last = [m for m in make_encoder("mobilenetv3_small", head=head).head.modules() if isinstance(m, nn.Linear)]
    own, default = 0.01, (3 * last.in_features) ** -0.5  # standard deviations
    assert last.weight.std().item() == pytest.approx(default if head == "wide" else own, rel=0.02)
    assert bool(last.bias.any()) == (head == "wide")


def test_vit_tiny_freezes_its_patches_and_interpolates_positions():
    encoder = make_encoder("vit_tiny", dim=8)
    assert {n for n, p in encoder.named_parameters() if not p.requires_grad} == {
        "backbone.to_patch_embedding.1.weight",
        "backbone.to_patch_embedding.1.bias",
    }
    assert encoder(torch.randn(2, 3, 32, 48)).shape == (2, 8)
    with pytest.raises(ValueError, match=r"vit_tiny needs sides that 16 divides, got \(40, 40\)"):
        encoder(torch.randn(2, 3, 40, 40))


@pytest.mark.parametrize("arch", [*SMALL, "deit_tiny", "tf_efficientnet_b0", "timm:resnet10t"])
@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_every_one_trains_at_32_pixels_with_every_parameter(arch, stem):
    if stem == "cifar" and ("vit" in arch or "deit" in arch or "tf_" in arch or "timm" in arch):
        with pytest.raises(ValueError, match="has no CIFAR stem"):
            make_encoder(arch, stem=stem)
        return
    torch.manual_seed(0)
    encoder = make_encoder(arch, head="wide", dim=16, stem=stem).train()
    z = encoder(torch.randn(4, 3, 32, 32))
    assert z.shape == (4, 16)
    z.square().sum().backward()
    without = [n for n, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


@pytest.mark.parametrize("arch", ["mobilenetv3_small", "efficientnet_b0", "tf_efficientnet_b0", "timm:resnet10t"])
def test_split_batchnorm_is_batchnorm_of_the_parts(arch):
    torch.manual_seed(0)
    whole = make_encoder(arch, dim=8)
    switch_dropout_off(whole)  # what is random would differ
    split = copy.deepcopy(whole)
    split_batchnorm(split, 2)
    images = torch.randn(8, 3, 64, 64)
    expected = torch.cat([copy.deepcopy(whole).train()(half) for half in images.chunk(2)])
    torch.testing.assert_close(split.train()(images), expected, rtol=1e-3, atol=1e-4)
    assert (whole.train()(images) - expected).abs().max() > 1e-3
    assert list(split.state_dict()) == list(whole.state_dict())
    copy.deepcopy(split)(images)  # as MoCo makes its key encoder


def test_sync_batchnorm_keeps_timms_activations():
    model = make_encoder("tf_efficientnet_b0", dim=8)
    kinds = {type(m).__name__ for m in convert_sync_batchnorm(model, torch.device("cuda")).modules()}
    assert "SyncBatchNormAct" in kinds and not {"BatchNormAct2d", "BatchNorm2d", "SyncBatchNorm"} & kinds
    plain = make_encoder("mobilenetv3_small", dim=8)
    kinds = {type(m).__name__ for m in convert_sync_batchnorm(plain, torch.device("cuda")).modules()}
    assert "SyncBatchNorm" in kinds and "BatchNorm2d" not in kinds


def test_names_are_unambiguous():
    names = list_architectures()
    assert {source_of(n) for n in names} == {"torchvision", "timm", "small models"}
    for i in range(4):
        assert source_of(f"efficientnet_b{i}") == "small models" and source_of(f"tv_efficientnet_b{i}") == "torchvision"
    assert type(make_classifier("mobilenet_v3_small")) is not type(make_classifier("mobilenetv3_small"))
    with pytest.raises(ValueError, match=r"timm has no model 'tf_eficientnet_b0': did you mean timm:tf_efficientnet"):
        make_classifier("timm:tf_eficientnet_b0")


def test_swav_widens_everything():
    wide = make_classifier("swav_resnet50w2")
    assert wide.conv1.out_channels == 128 and wide.layer1[0].conv1.weight.shape == (128, 128, 1, 1)
    assert wide.layer1[0].downsample[0].weight.shape == (512, 128, 1, 1) and wide.fc.in_features == 4096
    torch.manual_seed(0)
    images = torch.randn(1, 3, 32, 32)
    assert wide.eval()(images).shape == (1, 1000)
