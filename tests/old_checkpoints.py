"""Checkpoints as other projects write them, rebuilt from the names, shapes and formulas of those projects alone.

The small-model networks are written here a second time, as functions of their tensors, so that nothing of fastssl
says what its own copies must compute.
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import nn

from fastssl.models.encoders import make_backbone

LARGE = [  # kernel, expanded channels, channels, squeeze-and-excite, h-swish, stride: table 1 of arXiv 1905.02244
    (3, 16, 16, 0, 0, 1), (3, 64, 24, 0, 0, 2), (3, 72, 24, 0, 0, 1), (5, 72, 40, 1, 0, 2), (5, 120, 40, 1, 0, 1),
    (5, 120, 40, 1, 0, 1), (3, 240, 80, 0, 1, 2), (3, 200, 80, 0, 1, 1), (3, 184, 80, 0, 1, 1), (3, 184, 80, 0, 1, 1),
    (3, 480, 112, 1, 1, 1), (3, 672, 112, 1, 1, 1), (5, 672, 160, 1, 1, 2), (5, 960, 160, 1, 1, 1),
    (5, 960, 160, 1, 1, 1),
]  # fmt: skip
SMALL = [  # table 2
    (3, 16, 16, 1, 0, 2), (3, 72, 24, 0, 0, 2), (3, 88, 24, 0, 0, 1), (5, 96, 40, 1, 1, 2), (5, 240, 40, 1, 1, 1),
    (5, 240, 40, 1, 1, 1), (5, 120, 48, 1, 1, 1), (5, 144, 48, 1, 1, 1), (5, 288, 96, 1, 1, 2), (5, 576, 96, 1, 1, 1),
    (5, 576, 96, 1, 1, 1),
]  # fmt: skip
SQUEEZED = {16: 8, 72: 24, 96: 24, 120: 32, 144: 40, 240: 64, 288: 72, 480: 120, 576: 144, 672: 168, 960: 240}


def conv_bn(t, conv, bn, c_in, c_out, kernel, groups=1):
    """Names and random values of a convolution without bias and the batch norm after it."""
    t[conv + ".weight"] = torch.randn(c_out, c_in // groups, kernel, kernel) * (2 / (c_in // groups * kernel**2)) ** 0.5
    norm(t, bn, c_out)


def norm(t, name, c, running=True):
    t[name + ".weight"], t[name + ".bias"] = torch.rand(c) + 0.5, torch.randn(c) * 0.2
    if running:
        t[name + ".running_mean"], t[name + ".running_var"] = torch.randn(c) * 0.2, torch.rand(c) + 0.5
        t[name + ".num_batches_tracked"] = torch.tensor(7)


def linear(t, name, c_in, c_out, bias=True):
    t[name + ".weight"] = torch.randn(c_out, c_in) * c_in**-0.5
    if bias:
        t[name + ".bias"] = torch.randn(c_out) * 0.2


def batch_norm(t, name, x, eps=1e-5):
    return F.batch_norm(x, *(t[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")), eps=eps)


def apply_linear(t, name, x):
    return F.linear(x, t[name + ".weight"], t.get(name + ".bias"))


def mobilenetv3(table, features):
    """Tensors of a small-model MobileNetV3 without its classifier, and (tensors, images) -> features."""
    t, c = OrderedDict(), 16
    conv_bn(t, "features.0.0", "features.0.1", 3, 16, 3)
    for i, (kernel, hidden, c_out, se, _, _) in enumerate(table, 1):
        p = f"features.{i}.conv."
        last = 0
        if hidden != c:
            conv_bn(t, p + "0", p + "1", c, hidden, 1)
            last = 3
        conv_bn(t, p + f"{last}", p + f"{last + 1}", hidden, hidden, kernel, hidden)
        if se:
            at = p + ("3" if hidden == c else "5")
            linear(t, at + ".fc.0", hidden, SQUEEZED[hidden])
            linear(t, at + ".fc.2", SQUEEZED[hidden], hidden)
        conv_bn(t, p + f"{last + 4}", p + f"{last + 5}", hidden, c_out, 1)
        c = c_out
    conv_bn(t, "conv.0", "conv.1", c, hidden, 1)
    linear(t, "classifier.0", hidden, features)

    def hswish(x):
        return x * F.relu6(x + 3) / 6

    def squeeze(t, name, x):
        gate = apply_linear(t, name + ".fc.2", F.relu(apply_linear(t, name + ".fc.0", x.mean((2, 3)))))
        return x * (F.relu6(gate + 3) / 6)[:, :, None, None]

    def forward(t, x):
        c = 16
        x = hswish(batch_norm(t, "features.0.1", F.conv2d(x, t["features.0.0.weight"], stride=2, padding=1)))
        for i, (kernel, hidden, c_out, se, hs, stride) in enumerate(table, 1):
            p, act, y, at = f"features.{i}.conv.", hswish if hs else F.relu, x, 0
            if hidden != c:
                y, at = act(batch_norm(t, p + "1", F.conv2d(y, t[p + "0.weight"]))), 3
            y = F.conv2d(y, t[p + f"{at}.weight"], stride=stride, padding=kernel // 2, groups=hidden)
            y = batch_norm(t, p + f"{at + 1}", y)
            if hidden == c:  # the activation first
                y = act(y)
                y = squeeze(t, p + "3", y) if se else y
            else:
                y = act(squeeze(t, p + "5", y) if se else y)
            y = batch_norm(t, p + f"{at + 5}", F.conv2d(y, t[p + f"{at + 4}.weight"]))
            x = x + y if stride == 1 and c == c_out else y
            c = c_out
        x = hswish(batch_norm(t, "conv.1", F.conv2d(x, t["conv.0.weight"])))
        return hswish(apply_linear(t, "classifier.0", x.mean((2, 3))))

    return t, forward


def efficientnet(size):
    """The same for EfficientNet-B0 to B3, padded for the nominal size whatever the image."""
    width, depth, nominal = {"b0": (1, 1, 224), "b1": (1, 1.1, 240), "b2": (1.1, 1.2, 260), "b3": (1.2, 1.4, 300)}[size]

    def rounded(c):
        new = max(8, int(c * width + 4) // 8 * 8)
        return new + 8 if new < 0.9 * c * width else new

    blocks, c, side = [], rounded(32), math.ceil(nominal / 2)
    stages = "1 3 1 1 16,2 3 2 6 24,2 5 2 6 40,3 3 2 6 80,3 5 1 6 112,4 5 2 6 192,1 3 1 6 320"  # table 1
    for stage in stages.split(","):
        r, kernel, s, e, o = map(int, stage.split())
        for i in range(math.ceil(r * depth)):
            stride = s if i == 0 else 1
            blocks.append((c, rounded(o), kernel, stride, e, side))
            c, side = rounded(o), math.ceil(side / stride)
    t, features = OrderedDict(), rounded(1280)
    conv_bn(t, "_conv_stem", "_bn0", 3, rounded(32), 3)
    for i, (c_in, c_out, kernel, _, e, _) in enumerate(blocks):
        p, hidden = f"_blocks.{i}.", c_in * e
        if e != 1:
            conv_bn(t, p + "_expand_conv", p + "_bn0", c_in, hidden, 1)
        conv_bn(t, p + "_depthwise_conv", p + "_bn1", hidden, hidden, kernel, hidden)
        for name, a, b in [("_se_reduce", hidden, int(c_in * 0.25)), ("_se_expand", int(c_in * 0.25), hidden)]:
            t[p + name + ".weight"], t[p + name + ".bias"] = torch.randn(b, a, 1, 1) * a**-0.5, torch.randn(b)
        conv_bn(t, p + "_project_conv", p + "_bn2", hidden, c_out, 1)
    conv_bn(t, "_conv_head", "_bn1", c, features, 1)

    def same(x, weight, stride, side, groups=1):
        k = weight.shape[-1]
        pad = max((math.ceil(side / stride) - 1) * stride + k - side, 0)
        return F.conv2d(F.pad(x, [pad // 2, pad - pad // 2] * 2), weight, stride=stride, groups=groups)

    def forward(t, x):
        x = F.silu(batch_norm(t, "_bn0", same(x, t["_conv_stem.weight"], 2, nominal), 1e-3))
        for i, (c_in, c_out, _, stride, e, side) in enumerate(blocks):
            p, y = f"_blocks.{i}.", x
            if e != 1:
                y = F.silu(batch_norm(t, p + "_bn0", F.conv2d(y, t[p + "_expand_conv.weight"]), 1e-3))
            y = same(y, t[p + "_depthwise_conv.weight"], stride, side, c_in * e)
            y = F.silu(batch_norm(t, p + "_bn1", y, 1e-3))
            gate = F.conv2d(y.mean((2, 3), keepdim=True), t[p + "_se_reduce.weight"], t[p + "_se_reduce.bias"])
            gate = F.conv2d(F.silu(gate), t[p + "_se_expand.weight"], t[p + "_se_expand.bias"])
            y = F.conv2d(y * gate.sigmoid(), t[p + "_project_conv.weight"])
            y = batch_norm(t, p + "_bn2", y, 1e-3)
            x = x + y if stride == 1 and c_in == c_out else y
        return F.silu(batch_norm(t, "_bn1", F.conv2d(x, t["_conv_head.weight"]), 1e-3)).mean((2, 3))

    return t, forward


def vit_tiny():
    """The same for ViT-tiny at 224 pixels."""
    t = OrderedDict(pos_embedding=torch.randn(1, 197, 192), cls_token=torch.randn(1, 1, 192))
    linear(t, "to_patch_embedding.1", 768, 192)
    for i in range(12):
        p = f"transformer.layers.{i}."
        norm(t, p + "0.norm", 192, running=False)
        linear(t, p + "0.fn.to_qkv", 192, 1152, bias=False)
        linear(t, p + "0.fn.to_out.0", 384, 192)
        norm(t, p + "1.norm", 192, running=False)
        linear(t, p + "1.fn.net.0", 192, 768)
        linear(t, p + "1.fn.net.3", 768, 192)
    norm(t, "mlp_head.0", 192, running=False)

    def layer_norm(t, name, x):
        return F.layer_norm(x, (192,), t[name + ".weight"], t[name + ".bias"])

    def forward(t, images):
        rows = []
        for y in range(0, 224, 16):
            for x in range(0, 224, 16):
                rows.append(images[:, :, y : y + 16, x : x + 16].permute(0, 2, 3, 1).reshape(len(images), -1))
        x = apply_linear(t, "to_patch_embedding.1", torch.stack(rows, 1))
        x = torch.cat([t["cls_token"].repeat(len(images), 1, 1), x], 1) + t["pos_embedding"]
        for i in range(12):
            p = f"transformer.layers.{i}."
            q, k, v = apply_linear(t, p + "0.fn.to_qkv", layer_norm(t, p + "0.norm", x)).split(384, 2)
            heads = []
            for h in range(6):
                a, b, c = (z[:, :, 64 * h : 64 * h + 64] for z in (q, k, v))
                heads.append((a @ b.transpose(1, 2) / 8).softmax(2) @ c)
            x = x + apply_linear(t, p + "0.fn.to_out.0", torch.cat(heads, 2))
            y = F.gelu(apply_linear(t, p + "1.fn.net.0", layer_norm(t, p + "1.norm", x)))
            x = x + apply_linear(t, p + "1.fn.net.3", y)
        return layer_norm(t, "mlp_head.0", x[:, 0])

    return t, forward


def torchvision(name):
    """The same for a torchvision classifier whose last layer is `fc`."""
    model = tv.get_model(name, weights=None).eval()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if "running_var" in key or ("bn" in key and "weight" in key):
                value.copy_(torch.rand_like(value) + 0.5)
            elif "running_mean" in key or ("bn" in key and "bias" in key):
                value.copy_(torch.randn_like(value) * 0.2)
    tensors = OrderedDict((k, v) for k, v in model.state_dict().items() if not k.startswith("fc."))
    model.fc = nn.Identity()
    return tensors, lambda t, x: torch.func.functional_call(model, dict(t), (x,))


NETWORKS = {
    "mobilenetv3_small": (lambda: mobilenetv3(SMALL, 1024), 1024),
    "mobilenetv3_large": (lambda: mobilenetv3(LARGE, 1280), 1280),
    "efficientnet_b0": (lambda: efficientnet("b0"), 1280),
    "efficientnet_b1": (lambda: efficientnet("b1"), 1280),
    "efficientnet_b2": (lambda: efficientnet("b2"), 1408),
    "efficientnet_b3": (lambda: efficientnet("b3"), 1536),
    "vit_tiny": (vit_tiny, 192),
    "resnet18": (lambda: torchvision("resnet18"), 512),
    "resnet50": (lambda: torchvision("resnet50"), 2048),
}


def make_network(arch, seed=0):
    """(tensors without classifier, (tensors, images) -> features, number of features)"""
    torch.manual_seed(seed)
    build, features = NETWORKS[arch]
    with torch.no_grad():
        return *build(), features


def make_head(kind, c, dim=128):
    """A projection head by relative name: MoCo v1's fc is linear, v2's simple, the small models' wide."""
    t = OrderedDict()
    if kind == "linear":
        linear(t, "x", c, dim)
        return OrderedDict((k.removeprefix("x."), v) for k, v in t.items())
    hidden = 2 * c if kind == "wide" else c
    linear(t, "0", c, hidden)
    if kind == "simclr":
        norm(t, "1", hidden)
    if kind == "deep":
        linear(t, "2", c, c)
    linear(t, {"simple": "2", "wide": "2", "deep": "4", "dropout": "3", "simclr": "3"}[kind], hidden, dim)
    return t


def make_moco(arch, head="simple", seed=0, queue=64, scalar_label=False):
    """main_moco.py's checkpoint dict after 200 epochs, with its query features' function."""
    t, forward, c = make_network(arch, seed)
    state = OrderedDict()
    if scalar_label:
        state["module.scalar_label"] = torch.zeros((), dtype=torch.long)
    state["module.queue"], state["module.queue_ptr"] = F.normalize(torch.randn(128, queue), dim=0), torch.tensor([32])
    for name, shift in [("encoder_q", 0.0), ("encoder_k", 0.01)]:
        fc = make_head(head, c)
        for key, value in [*t.items(), *((f"fc.{k}", v) for k, v in fc.items())]:
            state[f"module.{name}.{key}"] = value + shift if value.is_floating_point() else value.clone()
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.03, "params": [0]}]}
    return {"epoch": 200, "arch": arch, "state_dict": state, "optimizer": optimizer}, t, forward


def make_seed(arch, seed=0):
    """SEED's checkpoint: a student and its teacher (kept small here), and the queue of the teacher's keys."""
    t, forward, c = make_network(arch, seed)
    fc = make_head("simple", c)
    state = OrderedDict((f"module.student.{k}", v) for k, v in [*t.items(), *((f"fc.{k}", v) for k, v in fc.items())])
    state.update({f"module.teacher.{k}": torch.randn(4) for k in ("conv1.weight", "fc.0.weight")})
    state["module.queue"], state["module.queue_ptr"] = torch.randn(128, 64), torch.tensor([0])
    return {"epoch": 200, "arch": "mobilenetv3", "state_dict": state, "optimizer": {}, "loss": 1.5}, t, forward


class OldMoCo(nn.Module):
    """The module main_moco.py trains, as its checkpoints describe it."""

    def __init__(self, arch, dim=128, queue=64):
        super().__init__()
        self.encoder_q, self.encoder_k = self.build(arch, dim), self.build(arch, dim).requires_grad_(False)
        self.register_buffer("queue", torch.zeros(dim, queue))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @staticmethod
    def build(arch, dim):
        model, _, c = make_backbone(arch)
        model.fc = nn.Sequential(nn.Linear(c, c), nn.ReLU(), nn.Linear(c, dim))
        return model
