"""Mobile networks alone are compiled with larger kernels, and the torch that is installed knows how."""

import pytest
import torch
from torch import _inductor, nn

from fastssl.moco import MoCo
from fastssl.models.batchnorm import convert_sync_batchnorm, split_batchnorm
from fastssl.models.encoders import make_encoder
from fastssl.trials.compile_encoders import set_compiled
from fastssl.trials.inductor_options import FUSE_MORE, inductor_options, is_mobile


@pytest.mark.parametrize("arch", ["mobilenetv3_small", "mobilenet_v2", "efficientnet_b0", "timm:test_efficientnet"])
def test_mobile_networks(arch):
    encoder = make_encoder(arch)
    split_batchnorm(encoder, 2)
    assert is_mobile(encoder)
    assert is_mobile(convert_sync_batchnorm(make_encoder(arch), torch.device("cuda")))


@pytest.mark.parametrize("arch", ["resnet18", "resnext50_32x4d", "regnet_y_400mf", "convnext_tiny", "deit_tiny"])
def test_others(arch):
    assert not is_mobile(make_encoder(arch, head="simple"))


def make_moco(groups):
    return MoCo(nn.Sequential(nn.Conv2d(4, 4, 3, groups=groups), nn.BatchNorm2d(4), nn.Flatten()), 4, 16, 0)


@pytest.mark.parametrize("how, mode", [("on", {}), ("graphs", {"triton.cudagraphs": True})])
def test_both_encoders_are_compiled_so(how, mode, monkeypatch):
    told = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: told.append(options))
    for groups, expected in ((1, mode), (4, mode | FUSE_MORE)):
        set_compiled(make_moco(groups), how)
        assert told == [{"options": expected}] * 2
        told.clear()


def test_torch_knows_the_options_and_computes_the_same():
    assert set(FUSE_MORE) <= set(_inductor.list_options())
    with pytest.raises(RuntimeError, match=r"(?i)unexpected optimization option"):
        torch.compile(nn.Linear(1, 1), options={"no_such_option": 1})
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.Hardswish())
    x = torch.randn(4, 4, 6, 6)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, options=inductor_options(model, "on"))(x), expected)


def test_an_option_that_torch_does_not_know_is_left_out(monkeypatch):
    monkeypatch.setattr(_inductor, "list_options", lambda: ["realize_reads_threshold"])
    assert inductor_options(make_moco(4).encoder_q, "on") == {"realize_reads_threshold": 8}
