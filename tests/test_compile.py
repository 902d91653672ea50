"""The encoders as torch.compile sees them: one graph each, with a gradient (q) and without (k), by architecture."""

import pytest
import torch

from fastssl.models import vit
from fastssl.models.batchnorm import split_batchnorm
from fastssl.models.encoders import make_encoder

ARCHITECTURES = (  # the modules of all recipes, and a family of its own
    "resnet18", "mobilenetv3_small", "efficientnet_b0", "deit_tiny", "vit_tiny", "shufflenet_v2_x0_5",
)  # fmt: skip


def compile_on_meta(arch, splits=1, head="linear"):
    """Traced without a number computed; fullgraph makes every break of the graph an error."""
    torch.compiler.reset()
    encoder = make_encoder(arch, head=head, dim=8)
    if arch == "deit_tiny":  # its blocks are alike, and each takes as long to trace
        encoder.backbone.blocks = encoder.backbone.blocks[:2]
    if splits > 1:
        split_batchnorm(encoder, splits)
    return torch.compile(encoder.to("meta").train(), backend="eager", fullgraph=True)


def make_view():
    return torch.empty(4, 3, 224, 224, device="meta").contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_an_encoder_is_one_graph(arch, monkeypatch):
    monkeypatch.setattr(vit, "DEPTH", 2)
    encoder = compile_on_meta(arch)
    z = encoder(make_view())
    assert z.shape == (4, 8) and z.requires_grad
    with torch.no_grad():
        assert not encoder(make_view()).requires_grad


@pytest.mark.parametrize("arch", ["resnet18", "timm:test_efficientnet"])  # the latter with timm's own batch norm
def test_split_batch_norm_and_dropout_heads_stay_in_the_graph(arch):
    assert compile_on_meta(arch, splits=2, head="dropout")(make_view()).shape == (4, 8)


def test_a_break_of_the_graph_would_be_seen():
    torch.compiler.reset()

    class Breaks(torch.nn.Module):
        def forward(self, x):
            torch._dynamo.graph_break()
            return x + 1

    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(Breaks(), backend="eager", fullgraph=True)(torch.ones(1))
