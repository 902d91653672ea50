"""Weights under the names that other projects use, for export. What has no exact counterpart there is refused."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from fastssl.foreign.fit import ALIASES
from fastssl.models.efficientnet import STAGES
from fastssl.models.encoders import classifier_name, make_backbone, source_of
from fastssl.models.tryout import build_without_memory

FORMATS = ("plain", "torchvision", "timm", "moco")
_RESNETS = "resnet18 resnet34 resnet50 resnet101 resnet152 wide_resnet50_2 wide_resnet101_2".split()
_RESNETS += "resnext50_32x4d resnext101_32x8d resnext101_64x4d".split()
# Of the EfficientNets, only B0 has a counterpart in timm, which pads for the actual image size: that agrees for B0
# wherever maps have even sizes, down to the last of 7 pixels.
_TOP = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "fc": "classifier"}
_SE = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2", **_SE}
_BLOCK = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
          "_project_conv": "conv_pwl", "_bn2": "bn3", **_SE}  # fmt: skip


def counterpart(arch: str, stem: str, to: str) -> str:
    """The name of this architecture in torchvision, timm or MoCo's scripts.

    Raises ValueError when they have none that computes exactly the same, and for a format that does not exist.
    """
    if to not in FORMATS:
        raise ValueError(f"there is no format {to!r}: choose one of {', '.join(FORMATS)}")
    if stem != "imagenet" and to != "plain":
        raise ValueError(f"{to} has no networks with the {stem} stem: use fastssl export --to plain")
    if to == "torchvision":
        name = ALIASES.get(arch, arch)
        if name.startswith("timm:") or source_of(name) != "torchvision":
            raise ValueError(f"torchvision has no network that computes the same as {arch}: use --to plain")
        return name.removeprefix("tv_")
    if to == "timm":
        known = {**{name: name for name in _RESNETS}, **ALIASES, "deit_tiny": "deit_tiny_patch16_224"}
        known |= {"vit_base": "vit_base_patch16_224", "efficientnet_b0": "tf_efficientnet_b0"}
        name = arch.removeprefix("timm:") if arch.startswith(("timm:", "tf_")) else known.get(arch)
        if name is None:
            raise ValueError(f"timm has no network that computes the same as {arch}: use --to plain")
        return name
    if to == "moco" and classifier_name(arch) != "fc":
        lacks = f"MoCo's scripts expect a classifier called fc, which {arch} lacks"
        raise ValueError(f"{lacks}: use fastssl export --to plain")
    return arch


def name_tensors(arch: str, to: str, backbone: dict[str, Tensor], head: dict[str, Tensor]) -> dict[str, Tensor]:
    """Backbone and head (which may be empty) as one state dict, under the names of the format `to`."""
    if head and to in ("torchvision", "timm") and set(head) != {"weight", "bias"}:
        raise ValueError(f"--to {to} can only hold a linear head: leave out --head, or use --to plain")
    whole = {**backbone, **{f"{classifier_name(arch)}.{name}": tensor for name, tensor in head.items()}}
    if (arch, to) == ("efficientnet_b0", "timm"):
        return {_timm_name(name): tensor for name, tensor in whole.items()}
    return whole


def moco_checkpoint(
    arch: str, query: dict[str, Tensor], key: dict[str, Tensor] | None, queue: Tensor | None, pointer: Tensor | None,
    epoch: int, optimizer: dict | None, scalar_label: bool = False,
) -> dict:  # fmt: skip
    """The dict that main_moco.py saves. query, key: named like a classifier's tensors; queue (D, K), pointer (1,).

    Without a key, which comes with a queue and a pointer, it holds only the query encoder.
    scalar_label: with the constant that moco_align_uniform's script has, and demands, when its contrastive term is on.
    """
    state = {f"module.encoder_q.{name}": tensor for name, tensor in query.items()}
    if key is not None:
        state |= {f"module.encoder_k.{name}": tensor for name, tensor in key.items()}
        state |= {"module.queue": queue, "module.queue_ptr": pointer}
        if scalar_label:
            state["module.scalar_label"] = torch.zeros((), dtype=torch.long)
    saved = {"epoch": epoch, "arch": arch, "state_dict": state}
    return saved if optimizer is None else {**saved, "optimizer": optimizer}


def moco_optimizer(arch: str, head: dict[str, Tensor], optimizer: dict) -> dict | None:
    """Our SGD state as that of main_moco.py, whose optimizer also lists frozen parameters and the key encoder's.

    None when the optimizer is not SGD, or its state is not one momentum for each trained parameter.
    """
    trained, count = trained_places(arch, len(head))
    groups, state = optimizer["param_groups"], optimizer["state"]
    if len(groups) != 1 or "dampening" not in groups[0] or len(groups[0]["params"]) != len(trained):
        return None
    moved = {trained[i]: {"momentum_buffer": entry["momentum_buffer"]} for i, entry in state.items()}
    kept = {k: groups[0][k] for k in ("lr", "momentum", "dampening", "weight_decay", "nesterov")}
    return {"state": moved, "param_groups": [{**kept, "params": list(range(count))}]}


def trained_places(arch: str, num_head: int) -> tuple[list[int], int]:
    """Where main_moco.py's optimiser has the parameters that are trained, and how many it lists.

    It lists those of the query encoder, frozen ones too, with the head's `num_head` last; then the key encoder's.
    """
    parameters = list(build_without_memory(lambda: make_backbone(arch))[0].parameters())
    trained = [i for i, p in enumerate(parameters) if p.requires_grad]
    trained += [len(parameters) + i for i in range(num_head)]
    return trained, 2 * (len(parameters) + num_head)


def _timm_name(name: str) -> str:
    """timm's name for a tensor of our EfficientNet-B0: timm counts blocks within their stage, ours are one list."""
    if match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(.+)", name):
        places = [(stage, i) for stage, (repeats, *_) in enumerate(STAGES) for i in range(repeats)]
        stage, i = places[int(match[1])]
        layers = _FIRST_BLOCK if stage == 0 else _BLOCK
        return f"blocks.{stage}.{i}.{layers[match[2]]}.{match[3]}"
    first, rest = name.split(".", 1)
    return f"{_TOP[first]}.{rest}"
