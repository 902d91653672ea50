"""Convolutions computed in other ways on a CPU: what nn.Conv2d computes, with its gradients, where they replace it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from fastssl.build import make_trainee
from fastssl.config import Config, replace
from fastssl.distributed import Ranks
from fastssl.models.cpu_conv import SmallConv2d, in_float32, use_cpu_convolutions, use_plain_convolutions
from fastssl.models.cpu_conv_patches import PatchProducts
from fastssl.models.cpu_conv_rows import RowProducts
from fastssl.models.cpu_conv_winograd import WinogradProducts
from fastssl.models.encoders import make_encoder

CPU = Ranks(0, 1, torch.device("cpu"))
NHWC = torch.channels_last
DEPTHWISE = in_float32(nn.Conv2d)


def make_pair(stride=1, bias=False, dtype=torch.float64):
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 5, 3, stride=stride, padding=1, bias=bias).to(dtype)
    patched = copy.deepcopy(plain)
    use_cpu_convolutions(patched)
    assert type(patched) is SmallConv2d
    return plain, patched


def run(conv, images, grad):
    images = images.clone().requires_grad_()
    maps = conv(images)
    maps.backward(grad(maps))
    gradients = [p.grad for p in conv.parameters()]
    conv.zero_grad()
    return [maps.detach(), images.grad, *gradients]


@pytest.mark.parametrize("layout", [NHWC, torch.contiguous_format])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stride, height", [(1, 1), (1, 2), (1, 3), (1, 4), (1, 5), *((2, n) for n in range(1, 10))])
def test_it_is_the_convolution(stride, height, bias, layout):
    plain, patched = make_pair(stride, bias)
    for batch in (1, 7):
        images = torch.randn(batch, 6, height, height, dtype=torch.float64).contiguous(memory_format=layout)
        for expected, found in zip(run(plain, images, torch.cos), run(patched, images, torch.cos)):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_only_small_square_maps_take_products(monkeypatch):
    plain, patched = make_pair()
    monkeypatch.setattr(RowProducts, "apply", None)
    monkeypatch.setattr(PatchProducts, "apply", None)
    for height, width in ((5, 5), (2, 3), (1, 2)):
        images = torch.randn(2, 6, height, width, dtype=torch.float64)
        assert torch.equal(patched(images), plain(images))
    plain, patched = plain.bfloat16(), patched.bfloat16()
    images = torch.randn(2, 6, 3, 3).bfloat16()
    assert torch.equal(patched(images), plain(images))


@pytest.mark.parametrize("height, stride", [(2, 1), (4, 1), (4, 2), (7, 2)])
@pytest.mark.parametrize("products", [RowProducts, PatchProducts])
def test_gradients_are_the_derivatives(products, height, stride):
    images = torch.randn(2, 3, height, height, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: products.apply(x, w, stride), (images, weight))


@pytest.mark.parametrize("height, width", [(1, 1), (1, 4), (2, 3), (4, 4), (4, 6), (7, 7), (5, 9)])
def test_gradients_of_winograds_way_are_the_derivatives(height, width):
    images = torch.randn(2, 3, height, width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: WinogradProducts.apply(x, w, 1), (images, weight))


def by_winograd(images, weight, grad):
    return [maps := WinogradProducts.apply(images, weight, 1), *torch.autograd.grad(maps, (images, weight), grad)]


def directly(images, weight, grad):
    return [maps := conv2d(images, weight, padding=1), *torch.autograd.grad(maps, (images, weight), grad)]


@pytest.mark.parametrize("layout", [NHWC, torch.contiguous_format])
@pytest.mark.parametrize("height", [1, 2, 4, 5, 7, 8, 14])
def test_winograds_way_is_the_convolution(height, layout, nan_poisoned_empty):
    torch.manual_seed(0)
    weight = torch.randn(5, 6, 3, 3, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    for batch, width in [(1, 1), (3, 3), (2, 4), (7, 6), (1, 7), (2, 8), (3, 13)]:
        images = torch.randn(batch, 6, height, width, dtype=torch.float64).contiguous(memory_format=layout)
        images, grad = images.requires_grad_(), torch.randn(batch, 5, height, width, dtype=torch.float64)
        expected = directly(images, weight, grad)
        for found, exact in zip(by_winograd(images, weight, grad), expected):
            torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
        assert found.is_contiguous(memory_format=NHWC)  # as the weights of an encoder lie, so nothing copies it


@pytest.mark.parametrize("channels, height", [(64, 16), (128, 8), (256, 4), (64, 7)])
def test_winograds_way_rounds_as_the_convolution_does(channels, height):
    torch.manual_seed(0)
    images, grad = torch.randn(2, 16, channels, height, height)
    weight = torch.randn(channels, channels, 3, 3) * 0.02
    tensors = images.requires_grad_(), weight.requires_grad_(), grad
    exact = directly(*(t.double() for t in tensors))
    for found, plain, truth in zip(by_winograd(*tensors), directly(*tensors), exact):
        assert (found - truth).norm() < 1.5 * (plain - truth).norm() + 1e-6 * truth.norm()


def test_where_winograds_way_is_taken(monkeypatch):
    """Where it pays: in float32, at stride 1, from 64 channels on, for images of 4 to 28 rows."""
    taken = []

    def apply(images, weight, stride):
        taken.append(images.shape[-1])
        return conv2d(images, weight, padding=1)

    monkeypatch.setattr(WinogradProducts, "apply", apply)
    narrow, wide, stride = nn.Conv2d(64, 63, 3, 1, 1), nn.Conv2d(64, 65, 3, 1, 1), nn.Conv2d(64, 64, 3, 2, 1)
    for conv in (narrow, wide, stride):
        use_cpu_convolutions(conv)
        for height in (3, 4, 9, 28, 29):
            conv(torch.randn(1, 64, height, height))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                conv(torch.randn(1, 64, height, height))
    wide(torch.randn(1, 64, 4, 8))
    assert taken == [4, 9, 28]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_second_derivatives_are_refused(dtype):
    _, patched = make_pair(dtype=dtype)
    images = torch.randn(2, 6, 2, 2, dtype=dtype, requires_grad=True)
    for power in (1, 3):
        with pytest.raises(RuntimeError, match="differentiated twice: call use_plain_convolutions"):
            torch.autograd.grad(patched(images).pow(power).sum(), images, create_graph=True)
    weight = torch.randn(3, 6, 3, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(WinogradProducts.apply(images.double(), weight, 1).sum(), images, create_graph=True)


@pytest.mark.parametrize("height", [1, 2])
def test_in_bf16_it_is_as_exact_as_the_convolution(height):
    plain, patched = make_pair(dtype=torch.float32)
    images = torch.randn(64, 6, height, height)
    exact = run(copy.deepcopy(plain).double(), images.double(), torch.sign)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        errors = [
            [((a - b).norm() / b.norm()).item() for a, b in zip(run(conv, images, torch.sign), exact)]
            for conv in (plain, patched)
        ]
        assert patched(images).dtype == torch.bfloat16
    for ours, theirs in zip(errors[1], errors[0]):
        assert ours < 1.5 * theirs + 1e-4


@pytest.mark.parametrize("kernel, stride, height", [(3, 1, 7), (3, 2, 8), (5, 2, 4), (5, 1, 2)])
def test_depthwise_convolutions_are_float32_under_autocast(kernel, stride, height):
    torch.manual_seed(0)
    plain = nn.Conv2d(12, 12, kernel, stride=stride, padding=kernel // 2, groups=12)
    patched = copy.deepcopy(plain)
    use_cpu_convolutions(patched)
    images = torch.randn(4, 12, height, height).bfloat16()
    assert type(patched) is DEPTHWISE and torch.equal(patched(images.float()), plain(images.float()))
    expected = run(plain, images.float(), lambda maps: torch.ones_like(maps))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(patched, images, lambda maps: torch.ones_like(maps))
    assert [t.dtype for t in found] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    for ours, exact in zip(found, expected):
        assert torch.equal(ours, exact.to(ours.dtype))  # one rounding of what float32 gives


def test_a_layer_without_gradients_gets_none():
    patched = make_pair()[1].requires_grad_(False)
    assert not patched(torch.randn(1, 6, 2, 2, dtype=torch.float64)).requires_grad


def test_which_layers_change_and_that_their_names_do_not():
    odd = [
        dict(kernel_size=3),
        dict(kernel_size=1),
        dict(kernel_size=3, padding="same"),
        dict(kernel_size=3, padding=1, groups=2),
        dict(kernel_size=3, padding=2, dilation=2),
        dict(kernel_size=3, padding=1, padding_mode="reflect"),
    ]
    odd = nn.Sequential(nn.Conv2d(1, 1, 3), *(nn.Conv2d(4, 4, **options) for options in odd))
    use_cpu_convolutions(odd)
    assert {type(conv) for conv in odd} == {nn.Conv2d}
    small = make_encoder("mobilenetv3_small", dim=8)
    use_cpu_convolutions(small)
    assert sum(type(m) is DEPTHWISE for m in small.modules()) == 11
    use_cpu_convolutions(small)  # again: nothing is left to do
    assert sum(type(m) is DEPTHWISE for m in small.modules()) == 11
    encoder = make_encoder("resnet18", dim=8)
    names = list(encoder.state_dict())
    use_cpu_convolutions(encoder)
    assert sum(type(m) is SmallConv2d for m in encoder.modules()) == 16 and list(encoder.state_dict()) == names
    use_plain_convolutions(encoder)
    assert not any(type(m) is SmallConv2d for m in encoder.modules())


@pytest.mark.parametrize("arch", ["efficientnet_b0", "tf_efficientnet_b0"])  # whose convolutions pad in their own way
def test_kinds_of_convolutions_keep_their_own_forward(arch):
    torch.manual_seed(0)
    plain = make_encoder(arch, dim=8).eval()
    patched = copy.deepcopy(plain)
    use_cpu_convolutions(patched)
    kinds = {type(m).__bases__[-1] for m in patched.modules() if type(m).__name__.startswith("Float32")}
    assert kinds and kinds != {nn.Conv2d}
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(patched(images), plain(images))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(patched(images), plain(images), rtol=0.1, atol=0.02)
    use_plain_convolutions(patched)
    assert [type(m) for m in patched.modules()] == [type(m) for m in plain.modules()]


def test_training_on_a_cpu_uses_them_and_compilers_do_not():
    config = replace(Config(), arch="resnet18", image_size=32, batch_size=4, queue_size=16, dim=8, device="cpu")
    moco = make_trainee(config, CPU).moco
    for encoder in (moco.encoder_q, moco.encoder_k):
        assert type(encoder.backbone.layer4[1].conv2) is SmallConv2d
    torch.compiler.reset()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = torch.compile(moco.encoder_q, backend="eager", fullgraph=True)(torch.randn(4, 3, 64, 64))
    assert z.shape == (4, 8)
    small = make_trainee(replace(config, arch="mobilenetv3_small"), CPU).moco.encoder_q
    assert any(type(m) is DEPTHWISE for m in small.modules())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.compile(small, backend="eager", fullgraph=True)(torch.randn(4, 3, 64, 64)).shape == (4, 8)
