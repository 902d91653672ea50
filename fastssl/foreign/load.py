"""Loads any checkpoint that `layout` knows as a module, with an account of every tensor in the file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn
from torchvision.models import ResNet

from fastssl.checkpoint import CheckpointError
from fastssl.foreign.choose import choose, doubt
from fastssl.foreign.fit import COUNTER, differences, few, fitting_architectures
from fastssl.foreign.heads import build_head, recognise_head
from fastssl.foreign.layout import SOLO_LEARN, Layout, find_encoder, split_classifier
from fastssl.foreign.read import Contents, is_weights, read_weights
from fastssl.models.encoders import Encoder, classifier_name, make_backbone


@dataclass(frozen=True)
class Report:
    """What was recognised, loaded and left out; `str(report)` tells it in a few lines."""

    path: Path
    kind: str  # "MoCo checkpoint, the query encoder", "state dict", ...
    arch: str
    stem: str
    feature_dim: int
    loaded: int  # tensors
    head: str  # "simple", "linear", ..., "none", "unknown"
    dim: int | None  # output dimension of the head
    epoch: int | None
    left_out: dict[str, list[str]]  # reason -> names
    notes: list[str]

    def __str__(self) -> str:
        stem = "" if self.stem == "imagenet" else f" with the {self.stem} stem"
        epoch = "" if self.epoch is None else f", epoch {self.epoch}"
        lines = [
            f"{self.path}: {self.kind}{epoch}; {self.arch}{stem}, {self.feature_dim} features",
            f"  loaded {self.loaded} tensors",
        ]
        lines += [f"  left out {reason} ({few(names)})" for reason, names in self.left_out.items()]
        return "\n".join(lines + [f"  {note}" for note in self.notes])


def load_pretrained(
    path: str | Path, arch: str | None = None, *, key: str = "q", with_head: bool = False, stem: str | None = None
) -> tuple[nn.Module, Report]:
    """A pretrained encoder in eval mode on the CPU, and the report of what was loaded.

    The module maps (B, 3, S, S) normalised images to (B, feature_dim) features, or, with `with_head`, is an `Encoder`
    that gives the head's (B, D) projections, not normalised. arch (a name of `list_architectures`, or timm:NAME) and
    stem default to what the file says, or to what its names and shapes fit. key="k" takes MoCo's key encoder.

    Raises CheckpointError (a ValueError) for a file that cannot be read safely, and for any tensor that is missing,
    unexpected or of another shape; it names the first of them and the architectures that would fit.
    """
    contents = read_weights(path)
    layout = _find(contents, key)
    arch, stem = choose(contents, layout, arch, stem)
    backbone, classifier, feature_dim = make_backbone(arch, stem)
    layout, notes = _load_backbone(contents, layout, backbone, classifier, arch, stem)
    if pads_more(layout.kind, stem) and isinstance(backbone, ResNet):
        backbone.conv1.padding = (2, 2)
        notes.append("its first convolution pads images by 2 pixels, as solo-learn's does for CIFAR, where ours pads 1")
    head, dim = recognise_head(layout.head, feature_dim)
    loaded, left_out = len(layout.backbone), dict(layout.left_out)
    left_out |= {f"the tensors of {name!r}": list(v) for name, v in contents.entries.items() if is_weights(v)}
    if with_head:
        if dim is None:
            held = f"an unknown head ({few(list(layout.head))})" if layout.head else "no head"
            raise CheckpointError(f"{path} has {held}: leave out --head to use the {feature_dim} features")
        module = build_head(head, feature_dim, dim)
        module.load_state_dict(layout.head)
        backbone = Encoder(backbone, feature_dim, module)
        loaded += len(layout.head)
    elif layout.head:
        outputs = f", {dim} outputs" if dim else ""
        left_out[f"the head ({head}{outputs})"] = list(layout.head)
    report = Report(
        contents.path, layout.kind, arch, stem, feature_dim, loaded, head, dim, _epoch(contents), left_out,
        notes,
    )  # fmt: skip
    return backbone.eval(), report


def load_into(path: str | Path, encoder: Encoder, arch: str, stem: str) -> list[str]:
    """Loads the weights of a checkpoint into `encoder`, to start from them. Returns lines for the log.

    The backbone must fit in full. Of the head, only tensors with the same name and shape are loaded, and the others
    keep their random values, as in the small-model project, where a distilled student may have had another head.
    Raises CheckpointError as `load_pretrained` does.
    """
    contents = read_weights(path)
    layout, notes = _load_backbone(contents, _find(contents, "q"), encoder.backbone, classifier_name(arch), arch, stem)
    if pads_more(layout.kind, stem):
        notes.append("solo-learn's first convolution pads images of CIFAR by 2 pixels, where this run's pads 1")
    own = encoder.head.state_dict()
    taken = {k: v for k, v in layout.head.items() if k in own and own[k].shape == v.shape}
    encoder.head.load_state_dict({**own, **taken})
    lines = [f"weights of {path} ({layout.kind}): {len(layout.backbone)} tensors of the backbone"]
    if taken:
        lines.append(f"head: loaded {few(list(taken))}")
    if other := [k for k in {**layout.head, **own} if k not in taken]:
        why = "names or shapes differ" if layout.head else "not in the file"
        lines.append(f"head: kept random weights for {few(other)} ({why})")
    return lines + notes + [f"left out {reason} ({few(names)})" for reason, names in layout.left_out.items()]


def pads_more(kind: str, stem: str) -> bool:
    """Whether a `Report`'s kind and stem mean solo-learn's CIFAR stem, which no tensor tells from ours."""
    return kind.startswith(SOLO_LEARN) and stem == "cifar"


def _find(contents: Contents, key: str) -> Layout:
    try:
        return find_encoder(contents.tensors, key)
    except CheckpointError as error:
        raise CheckpointError(f"{contents.path} {error}") from None


def _load_backbone(
    contents: Contents, whole: Layout, backbone: nn.Module, classifier: str, arch: str, stem: str
) -> tuple[Layout, list[str]]:
    """Loads the backbone strictly. Returns the layout with its head split off, and notes for the report."""
    layout = split_classifier(whole, classifier)
    own = backbone.state_dict()
    wrong = differences(layout.backbone, {k: tuple(v.shape) for k, v in own.items()})
    if wrong:
        others = [with_stem(*pair) for pair in fitting_architectures(whole)]
        held = few(list(layout.backbone)) or "nothing"
        advice = f"it fits {', '.join(others)}" if others else f"no architecture known here has these layers: {held}"
        raise CheckpointError(f"{contents.path} does not fit {with_stem(arch, stem)}: {few(wrong)}; {advice}")
    lacking = [k for k in own if k not in layout.backbone]  # counters, or it would not fit
    own.update(layout.backbone)  # own has an attribute that a new dict would lack: the version, which MNASNet needs
    backbone.load_state_dict(own)
    notes = [f"the file lacks {COUNTER}, so it starts at 0"] if lacking else []
    return layout, notes + doubt(contents, whole, arch, stem)


def with_stem(arch: str, stem: str) -> str:
    """An architecture as a command line has it."""
    return arch if stem == "imagenet" else f"{arch} --stem {stem}"


def _epoch(contents: Contents) -> int | None:
    epoch = contents.entries.get("epoch")
    return epoch if isinstance(epoch, int) else None
