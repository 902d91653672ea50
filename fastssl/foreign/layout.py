"""Tells from the names of its tensors which project wrote a checkpoint, and which of them belong to one encoder.

  MoCo v1, v2, align + uniform, small models   [module.]encoder_q.* encoder_k.* queue queue_ptr [scalar_label]
  SEED                                         [module.]student.* teacher.* [queue small_queue queue_ptr]
  fastssl                                      encoder_q.backbone.* encoder_q.head.* encoder_k.* queue queue_ptr
  DINO                                         student.* teacher.*, each of them backbone.* head.*
  SimSiam                                      [module.]encoder.* predictor.*
  MoCo v3                                      [module.]base_encoder.* momentum_encoder.* predictor.*
  solo-learn                                   backbone.* classifier.* and any of the side networks below
  Barlow Twins, VICReg, lightly                backbone.* or student_backbone.*, and any of them
  SwAV                                         [module.]conv1 ... projection_head.* prototypes.*
  SimCLR (in the small-model project)          [module.]encoder_q.module.*
  torchvision, timm, a linear classifier       [module.]conv1 ... fc.*

`module.` (DDP), `_orig_mod.` (torch.compile) and `model.` (Lightning) may stand before any of these names, and inside
them.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import Tensor

from fastssl.checkpoint import CheckpointError

WRAPPERS = ("module.", "_orig_mod.", "model.")
SOLO_LEARN = "solo-learn"
_ENCODERS = {  # prefix -> (project, which encoder, what people call it)
    "encoder_q.": ("MoCo", "q", "the query encoder"),
    "encoder_k.": ("MoCo", "k", "the key encoder"),
    "student.": ("SEED", "q", "the student"),
    "teacher.": ("SEED", "k", "the teacher"),  # also DINO's, where each of the two has a backbone and a head
    "encoder.": ("SimSiam", "q", "the encoder"),
    "base_encoder.": ("MoCo v3", "q", "the query encoder"),
    "momentum_encoder.": ("MoCo v3", "k", "the key encoder"),
    "backbone.": ("self-supervised", "q", "the backbone"),  # (fastssl's own is found first, by `_has_own_names`)
    "student_backbone.": ("self-supervised", "q", "the student's backbone"),
    "momentum_backbone.": ("self-supervised", "k", "the momentum backbone"),
    "backbone_momentum.": ("self-supervised", "k", "the momentum backbone"),
    "key_backbone.": ("self-supervised", "k", "the momentum backbone"),
    "teacher_backbone.": ("self-supervised", "k", "the teacher's backbone"),
}
_STATE = {**dict.fromkeys(("queue", "small_queue", "queue_ptr"), "the queue"), "scalar_label": "a constant"}
_SIDES = {  # networks beside the encoders, by the first part of their names
    **dict.fromkeys(("predictor", "predictor2", "transformer_encoder", "prediction_head"), "the predictor"),
    **dict.fromkeys(("projector", "projection_head", "head"), "the projector"),
    **dict.fromkeys(("student_head", "student_projection_head"), "the student's projector"),
    **dict.fromkeys(("momentum_projector", "projection_head_momentum", "momentum_head"), "the momentum projector"),
    **dict.fromkeys(("teacher_head", "teacher_projection_head", "key_projection_head"), "the momentum projector"),
    **dict.fromkeys(("classifier", "momentum_classifier", "online_classifier"), "the classifier trained beside it"),
    **dict.fromkeys(("queues", "queue_y", "queue_index"), "the queue"),
    **dict.fromkeys(("criterion", "dino_loss_func", "memory_bank"), "the loss's memory"),
    "student_backbone": "the student's backbone",
    "prototypes": "the prototypes",
    "bn": "the batch norm of the loss",
}
# the children of a ResNet by their position
_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
# torchvision's published DenseNets have layers norm.1 and conv.2, its code norm1 and conv2
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")
_OTHER_HEADS = {"projection_head.": "SwAV's projection head", "prototypes": "SwAV's prototypes"}


class Layout(NamedTuple):
    """One encoder's weights, and why the other tensors of the file are not among them."""

    kind: str
    backbone: dict[str, Tensor]
    head: dict[str, Tensor] | None  # None: it may be part of `backbone`, under the classifier's name
    left_out: dict[str, list[str]]  # reason -> names in the file


def find_encoder(tensors: dict[str, Tensor], key: str = "q") -> Layout:
    """The query encoder (key="q", also a SEED student) or the key encoder (key="k") among the weights of a file.

    Raises CheckpointError when it is not there, and for tensors that belong to no known part; the message continues a
    sentence that begins with the name of the file.
    """
    if key not in ("q", "k"):
        raise ValueError(f"unknown encoder {key!r}: choose q (query) or k (key)")
    tensors = strip_wrappers(tensors)
    groups = _find_groups(tensors)
    projects = {_ENCODERS[prefix][0] for prefix, group in groups.items() if group}
    if not projects:
        if key == "k":
            raise CheckpointError("has no key encoder: leave out --key k")
        return _split_own("state dict", tensors, {})
    if len(projects) > 1:
        raise CheckpointError(f"holds encoders of {' and '.join(sorted(projects))} at once: keep only one of them")
    (project,) = projects
    if project == "SEED" and _has_own_names(strip_wrappers(groups["student."] or groups["teacher."])):
        project = "DINO"
    if project == "self-supervised" and {"classifier.weight", "classifier.bias"} <= tensors.keys():
        project = SOLO_LEARN
    if project == "SEED" and key == "k":
        raise CheckpointError("has a student and a teacher (SEED), but no key encoder: leave out --key k")
    left_out: dict[str, list[str]] = {}
    chosen: dict[str, Tensor] | None = None
    kind = project
    for prefix, group in groups.items():
        _, which, name = _ENCODERS[prefix]
        if group and which == key:
            chosen, kind = group, f"{project} checkpoint, {name}"
        elif group:
            left_out[name] = [prefix + k for k in group]
    if chosen is None:
        lacking, mend = ("key", "leave out --key k") if key == "k" else ("query", "give another checkpoint")
        raise CheckpointError(f"has no {lacking} encoder, only {', '.join(left_out)}: {mend}")
    sides = {} if project in ("MoCo", "SEED") else _SIDES
    for name in tensors:
        if not name.startswith(tuple(groups)):
            reason = _STATE.get(name) or sides.get(name.split(".")[0])
            if reason is None:
                raise CheckpointError(f"has a tensor {name!r} unknown in {project} checkpoints: save the encoder alone")
            left_out.setdefault(reason, []).append(name)
    return _split_own(kind, strip_wrappers(chosen), left_out)


def _find_groups(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors below each prefix of an encoder that may be one."""
    groups = {} if _has_own_names(tensors) else {prefix: _below(tensors, prefix) for prefix in _ENCODERS}
    if {name.split(".")[0] for name in tensors} != {"encoder", "predictor"}:
        groups.pop("encoder.", None)  # torchvision's ViTs have an encoder inside
    if groups.get("backbone."):
        groups.pop("student_backbone.")  # of lightly's DINO: what its benchmarks evaluate is the average, the backbone
    return groups


def strip_wrappers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors without the `WRAPPERS` that begin all names, and without inner `_orig_mod.`."""
    while tensors:
        prefix = next((w for w in WRAPPERS if all(k.startswith(w) for k in tensors)), None)
        if prefix is None:
            break
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
    plain = {k.replace("._orig_mod.", ".").removeprefix("_orig_mod."): v for k, v in tensors.items()}
    return plain if len(plain) == len(tensors) else tensors  # two names may become one


def _name_children(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gives a ResNet that was wrapped as nn.Sequential(*children), as in lightly's guides, its own names again."""
    parts = [name.partition(".") for name in tensors]  # (number, ".", the rest)
    if not all(number in _CHILDREN for number, *_ in parts):
        return tensors
    return {f"{_CHILDREN[number]}.{rest}": tensor for (number, _, rest), tensor in zip(parts, tensors.values())}


def split_classifier(layout: Layout, classifier: str) -> Layout:
    """The layout with the tensors under the classifier's name (`fc`, `classifier.3`) as its head.

    Without any, those under `fc`, as evaluations call theirs whatever the architecture.
    """
    if layout.head is not None:
        return layout
    prefix = f"{classifier}." if any(k.startswith(f"{classifier}.") for k in layout.backbone) else "fc."
    backbone = {k: v for k, v in layout.backbone.items() if not k.startswith(prefix)}
    return layout._replace(backbone=backbone, head=_below(layout.backbone, prefix))


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _has_own_names(tensors: dict[str, Tensor]) -> bool:
    """Whether this is one encoder named as ours and DINO's are: a backbone and a head."""
    return all(name.startswith(("backbone.", "head.")) for name in tensors)


def _split_own(kind: str, encoder: dict[str, Tensor], left_out: dict[str, list[str]]) -> Layout:
    """Splits an encoder: ours and DINO's have a backbone and a head, others keep both under a classifier's names."""
    if encoder and _has_own_names(encoder):
        kind = kind.replace("MoCo checkpoint", "fastssl checkpoint")
        backbone = _name_children(strip_wrappers(_below(encoder, "backbone.")))
        return Layout(kind, backbone, _below(encoder, "head.") or None, left_out)  # SimCLR scripts keep theirs as fc
    reasons = {k: reason for k in encoder for prefix, reason in _OTHER_HEADS.items() if k.startswith(prefix)}
    for name, reason in reasons.items():
        left_out.setdefault(reason, []).append(name)
    own = {_OLD_DENSENET.sub(r"\1\2.", k): v for k, v in encoder.items() if k not in reasons}
    return Layout(kind, _name_children(own), None, left_out)
