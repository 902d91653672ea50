"""Encoders and heads: torchvision's own features and keys, every architecture's surgery, stems and errors."""

import copy

import pytest
import torch
import torchvision.models as tv
from torch import nn

from fastssl.models import list_architectures, list_heads, make_encoder, make_head
from fastssl.models.encoders import source_of

# name -> (path of the classifier's last Linear, features), from torchvision's source
CLASSIFIERS = {
    "resnet18": ("fc", 512),
    "mobilenet_v3_small": ("classifier.3", 1024),
    "mobilenet_v3_large": ("classifier.3", 1280),
    "tv_efficientnet_b0": ("classifier.1", 1280),
    "shufflenet_v2_x0_5": ("fc", 1024),
}


def make_pair(arch):
    """Our encoder and torchvision's classifier with the same weights; running statistics and biases not trivial."""
    torch.manual_seed(0)
    encoder = make_encoder(arch)
    classifier = tv.get_model(arch.removeprefix("tv_"), weights=None)
    path, _ = CLASSIFIERS[arch]
    with torch.no_grad():
        for name, tensor in classifier.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5 if "running_var" in name else torch.randn_like(tensor) * 0.1)
    weights = {k: v for k, v in classifier.state_dict().items() if not k.startswith(path + ".")}
    return encoder, classifier, weights


@pytest.mark.parametrize("arch", CLASSIFIERS)
@pytest.mark.parametrize("training", [False, True])
def test_features_are_what_torchvision_feeds_its_classifier(arch, training):
    encoder, classifier, weights = make_pair(arch)
    encoder.backbone.load_state_dict(weights, strict=True)
    path, feature_dim = CLASSIFIERS[arch]
    fed = []
    classifier.get_submodule(path).register_forward_pre_hook(lambda module, args: fed.append(args[0]))
    images = torch.randn(2, 3, 64, 64)
    outputs = []
    for model in (classifier, encoder.backbone):
        model.train(training)
        torch.manual_seed(1)  # dropout
        with torch.no_grad():
            outputs.append(model(images))
    features = outputs[1]
    assert encoder.feature_dim == feature_dim and features.shape == (2, feature_dim)
    assert features.std() > 0
    assert torch.equal(features, fed[0])


@pytest.mark.parametrize("arch", CLASSIFIERS)
def test_backbone_keys_are_torchvisions_without_the_classifier(arch):
    encoder, classifier, weights = make_pair(arch)
    assert list(encoder.backbone.state_dict()) == list(weights)
    result = classifier.load_state_dict(encoder.backbone.state_dict(), strict=False)
    path, _ = CLASSIFIERS[arch]
    assert set(result.missing_keys) == {f"{path}.weight", f"{path}.bias"} and not result.unexpected_keys


def test_mobilenet_keeps_its_penultimate_layer():
    classifier = make_encoder("mobilenet_v3_small").backbone.classifier
    assert [type(m) for m in classifier] == [nn.Linear, nn.Hardswish, nn.Dropout, nn.Identity]
    assert classifier[0].out_features == 1024 and classifier[2].p == 0.2


def test_random_weights_are_torchvisions_own_for_the_same_seed():
    torch.manual_seed(3)
    expected = tv.resnet18(weights=None).state_dict()
    torch.manual_seed(3)
    encoder = make_encoder("resnet18", head="wide")
    assert all(torch.equal(v, expected[k]) for k, v in encoder.backbone.state_dict().items())


@pytest.mark.parametrize(
    "arch, feature_dim",
    [("alexnet", 4096), ("convnext_tiny", 768), ("mnasnet0_5", 1280), ("mobilenet_v2", 1280),
     ("swin_v2_t", 768), ("vgg11_bn", 4096), ("vit_b_16", 768)],
)  # fmt: skip
def test_every_family_gives_up_its_last_linear(arch, feature_dim):
    with torch.device("meta"):
        encoder, classifier = make_encoder(arch, dim=7), tv.get_model(arch, weights=None)
    *_, last = encoder.backbone.modules()
    assert type(last) is nn.Identity
    assert encoder.feature_dim == feature_dim and tuple(encoder.head.weight.shape) == (7, feature_dim)
    lost = [v for k, v in classifier.state_dict().items() if k not in encoder.backbone.state_dict()]
    assert {tuple(v.shape) for v in lost} <= {(1000, feature_dim), (1000,)} and lost


def test_the_list_holds_every_torchvision_classifier_that_ends_in_a_linear_layer():
    ours = {name.removeprefix("tv_") for name in list_architectures() if source_of(name) == "torchvision"}
    missing = set(tv.list_models(module=tv)) - ours
    assert missing == {"squeezenet1_0", "squeezenet1_1"}
    assert list_architectures() == sorted(list_architectures())


@pytest.mark.parametrize("arch", ["googlenet", "inception_v3"])
def test_auxiliary_classifiers_are_left_out(arch):
    encoder = make_encoder(arch, dim=16).train()
    assert encoder(torch.randn(2, 3, 96, 96)).shape == (2, 16)


@pytest.mark.parametrize("head", list_heads())
def test_encoder_is_head_after_backbone_and_not_normalised(head):
    torch.manual_seed(0)
    encoder = make_encoder("resnet18", head=head, dim=32, stem="cifar").eval()
    images = torch.randn(3, 3, 32, 32)
    z = encoder(images)
    assert z.shape == (3, 32)
    assert torch.equal(z, encoder.head(encoder.backbone(images)))
    assert (z.norm(dim=1) - 1).abs().min() > 1e-3
    z.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


HEADS = {  # weight shapes for 5 features and dimension 3, in order
    "linear": [(3, 5)],
    "simple": [(5, 5), (3, 5)],
    "deep": [(5, 5), (5, 5), (3, 5)],
    "wide": [(10, 5), (3, 10)],
    "dropout": [(5, 5), (3, 5)],
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_compute_what_they_are_called(name):
    torch.manual_seed(0)
    head = make_head(name, 5, 3).eval()
    assert list_heads() == list(HEADS)
    weights = [p for p in head.parameters() if p.ndim == 2]
    biases = [p for p in head.parameters() if p.ndim == 1]
    assert [tuple(w.shape) for w in weights] == HEADS[name]
    x = torch.randn(4, 5)
    expected = x
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        expected = (expected.clamp(min=0) if i else expected) @ w.T + b
    torch.testing.assert_close(head(x), expected)


def test_dropout_head_drops_half_of_the_rectified_hidden_units():
    torch.manual_seed(0)
    head = make_head("dropout", 1000, 2).train()
    hidden = []
    head[-1].register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    x = torch.randn(50, 1000)
    head(x)
    rectified = head[0](x).relu()
    kept = hidden[0] != 0
    torch.testing.assert_close(hidden[0][kept], 2 * rectified[kept])
    assert abs(kept[rectified > 0].float().mean() - 0.5) < 0.02


# how much larger the last map becomes, on a 64-pixel image
@pytest.mark.parametrize(
    "arch, gain",
    [("resnet18", 4), ("resnext50_32x4d", 4), ("densenet121", 4), ("shufflenet_v2_x0_5", 4), ("mobilenet_v2", 2),
     ("mobilenet_v3_small", 2), ("tv_efficientnet_b0", 2), ("mnasnet0_5", 2), ("regnet_y_400mf", 2)],
)  # fmt: skip
def test_cifar_stem_keeps_the_resolution(arch, gain):
    def first_and_last_map(stem):
        model = make_encoder(arch, stem=stem).eval()
        sizes = []
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda m, args, out: sizes.append(out.shape[-1]))
        with torch.no_grad():
            model(torch.randn(1, 3, 64, 64))
        return sizes[0], min(s for s in sizes if s > 1)

    first, last = first_and_last_map("imagenet")
    cifar_first, cifar_last = first_and_last_map("cifar")
    assert (first, cifar_first) == (32, 64)
    assert cifar_last == gain * last


def test_cifar_resnet_stem_is_the_papers():
    backbone = make_encoder("resnet50", stem="cifar").backbone
    conv = backbone.conv1
    assert (conv.kernel_size, conv.stride, conv.padding, conv.bias) == ((3, 3), (1, 1), (1, 1), None)
    assert type(backbone.maxpool) is nn.Identity
    assert conv.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)  # He initialisation, fan out
    assert list(backbone.state_dict()) == [k for k in tv.resnet50().state_dict() if not k.startswith("fc.")]


@pytest.mark.parametrize("arch", ["vit_b_32", "convnext_tiny", "swin_t", "alexnet", "vgg11"])
def test_families_without_a_cifar_stem_say_so(arch):
    with torch.device("meta"), pytest.raises(ValueError, match=rf"^{arch} has no CIFAR stem: use --stem imagenet"):
        make_encoder(arch, stem="cifar")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"arch": "resnt18"}, r"unknown architecture 'resnt18': did you mean 'resnet18'\?"),
        ({"arch": "mobilenetv3-small"}, r"did you mean 'mobilenetv3_small'\?"),
        ({"arch": "ResNet50"}, r"did you mean 'resnet50'\?"),
        ({"arch": "?"}, r"unknown architecture '\?': .*fastssl models"),
        ({"arch": "squeezenet1_1"}, r"squeezenet1_1 has no last Linear layer"),
        ({"arch": "resnet18", "head": "wider"}, r"unknown head 'wider': did you mean 'wide'\?"),
        ({"arch": "resnet18", "head": "mlp!"}, r"unknown head 'mlp!': choose one of linear, simple"),
        ({"arch": "resnet18", "stem": "cifar10"}, r"unknown stem 'cifar10': choose imagenet or cifar"),
        ({"arch": "resnet18", "dim": 0}, r"sizes of at least 1, got 512 features and dimension 0"),
    ],
)
def test_wrong_names_are_one_clear_sentence(options, message):
    with pytest.raises(ValueError, match=message) as error:
        make_encoder(**options)
    assert "\n" not in str(error.value)


def test_encoders_are_independent_and_copyable():
    a, b = make_encoder("resnet18"), make_encoder("resnet18")
    assert not torch.equal(a.backbone.conv1.weight, b.backbone.conv1.weight)
    key = copy.deepcopy(a)
    assert all(torch.equal(x, y) and x is not y for x, y in zip(a.parameters(), key.parameters()))
    assert list(key.state_dict())[-2:] == ["head.weight", "head.bias"]
