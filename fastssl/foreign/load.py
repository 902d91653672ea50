"""`load_pretrained`: any checkpoint of `layout` as a module, with an account of every tensor in the file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from fastssl.checkpoint import CheckpointError
from fastssl.foreign.fit import COUNTER, differences, fits, fitting_architectures
from fastssl.foreign.heads import build_head, name_head, output_dim
from fastssl.foreign.layout import Layout, find_encoder, split_classifier
from fastssl.foreign.read import Contents, is_weights, read_weights
from fastssl.models.encoders import Encoder, classifier_name, list_architectures, make_backbone

# timm has both under the same names and shapes; they pad differently, or have another number of attention heads.
_TWINS = {f"tf_efficientnet_b{i}": f"timm:efficientnet_b{i}" for i in range(4)}
_TWINS["mocov3_vit_small"] = "timm:vit_small_patch16_224"  # which is DINO's


@dataclass(frozen=True)
class Report:
    """What was recognised, loaded and left out; `str()` says it in a few lines."""

    path: Path
    kind: str  # "MoCo checkpoint, the query encoder", "state dict", ...
    arch: str
    stem: str
    feature_dim: int
    loaded: int  # tensors
    head: str  # "simple", "linear", ..., "none", "unknown"
    dim: int | None  # what the head gives
    epoch: int | None
    left_out: dict[str, list[str]] = field(default_factory=dict)  # reason -> names
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        stem = "" if self.stem == "imagenet" else f" with the {self.stem} stem"
        epoch = "" if self.epoch is None else f", epoch {self.epoch}"
        lines = [
            f"{self.path}: {self.kind}{epoch}; {self.arch}{stem}, {self.feature_dim} features",
            f"  loaded {self.loaded} tensors",
        ]
        lines += [f"  left out {reason} ({_few(names)})" for reason, names in self.left_out.items()]
        return "\n".join(lines + [f"  {note}" for note in self.notes])


def load_pretrained(
    path: str | Path, arch: str | None = None, *, key: str = "q", with_head: bool = False, stem: str | None = None
) -> tuple[nn.Module, Report]:
    """A pretrained encoder in eval mode, on the CPU, and what was made of its file.

    The module maps (B, 3, S, S) normalised images to (B, feature_dim) features; with `with_head` it is an `Encoder`
    that maps them on to the head's (B, D) projections, not normalised. `arch` (any name of `list_architectures`, or
    timm:NAME) and `stem` are taken from the file, or found by names and shapes, where they are not given. `key="k"`
    takes MoCo's key encoder.

    Raises CheckpointError (a ValueError) for a file that cannot be read safely, and for any tensor that is missing,
    unexpected or of another shape: it names the first of them and the architectures that would fit.
    """
    contents = read_weights(path)
    layout = _find(contents, key)
    arch, stem = _choose(contents, layout, arch, stem)
    backbone, classifier, feature_dim = make_backbone(arch, stem)
    layout, notes = _load_backbone(contents, layout, backbone, classifier, arch, stem)
    head = name_head(layout.head, feature_dim) or "unknown"
    dim = None if head in ("none", "unknown") else output_dim(layout.head)
    loaded, left_out = len(layout.backbone), dict(layout.left_out)
    left_out |= {f"the tensors of {name!r}": list(v) for name, v in contents.entries.items() if is_weights(v)}
    if with_head:
        if dim is None:
            held = f"a head that is none of those known ({_few(list(layout.head))})" if layout.head else "no head"
            raise CheckpointError(f"{path} has {held}: leave out --head to use the {feature_dim} features")
        module = build_head(head, feature_dim, dim)
        module.load_state_dict(layout.head)
        backbone = Encoder(backbone, feature_dim, module)
        loaded += len(layout.head)
    elif layout.head:
        left_out[f"the head ({head}{f', {dim} outputs' if dim else ''})"] = list(layout.head)
    report = Report(
        contents.path, layout.kind, arch, stem, feature_dim, loaded, head, dim, _epoch(contents), left_out,
        notes,
    )  # fmt: skip
    return backbone.eval(), report


def load_into(path: str | Path, encoder: Encoder, arch: str, stem: str) -> list[str]:
    """Gives `encoder` the weights of a checkpoint to start from, and says what it did.

    The backbone must fit in full. Of the head, tensors of the same name and shape are taken, as the small-model
    project does for a start from a distilled student whose head is another; the rest keep their random values.
    Raises CheckpointError as `load_pretrained` does.
    """
    contents = read_weights(path)
    layout, notes = _load_backbone(contents, _find(contents, "q"), encoder.backbone, classifier_name(arch), arch, stem)
    own = encoder.head.state_dict()
    taken = {k: v for k, v in layout.head.items() if k in own and own[k].shape == v.shape}
    encoder.head.load_state_dict({**own, **taken})
    said = [f"weights of {path} ({layout.kind}): {len(layout.backbone)} tensors of the backbone"]
    if taken:
        said.append(f"head: took {_few(list(taken))}")
    if other := [k for k in {**layout.head, **own} if k not in taken]:
        said.append(f"head: {_few(other)} {'differ' if layout.head else 'are not in it'}, so they start afresh")
    return said + notes + [f"left out {reason} ({_few(names)})" for reason, names in layout.left_out.items()]


def _find(contents: Contents, key: str) -> Layout:
    try:
        return find_encoder(contents.tensors, key)
    except CheckpointError as error:
        raise CheckpointError(f"{contents.path}: {error}") from None


def _choose(contents: Contents, layout: Layout, arch: str | None, stem: str | None) -> tuple[str, str]:
    """The architecture and stem: as asked, as the file says where that fits, else the one that fits."""
    config = contents.entries.get("config")
    own = config if isinstance(config, dict) else contents.entries
    said_arch, said_stem = own.get("arch"), own.get("stem")
    said_stem = said_stem if isinstance(said_stem, str) else "imagenet"
    if arch is not None:
        return arch, stem or said_stem
    if said_arch in list_architectures():
        for choice in dict.fromkeys([stem or said_stem, stem or "imagenet"]):
            if fits(layout, said_arch, choice):
                return said_arch, choice
    found = [pair for pair in fitting_architectures(layout) if stem in (None, pair[1])]
    if len(found) == 1 and found[0][0] not in _TWINS:
        return found[0]
    if not found and said_arch in list_architectures():
        return said_arch, stem or "imagenet"  # which says what does not fit
    if not found:
        raise CheckpointError(
            f"{contents.path} ({layout.kind} of {_few(list(layout.backbone))}) fits no architecture known here: name "
            "one with -a"
        )
    names = [name for found_arch, _ in found for name in (found_arch, _TWINS.get(found_arch)) if name]
    raise CheckpointError(f"{contents.path} fits {' and '.join(names)}, which compute differently: name one with -a")


def _load_backbone(
    contents: Contents, whole: Layout, backbone: nn.Module, classifier: str, arch: str, stem: str
) -> tuple[Layout, list[str]]:
    """Loads strictly; gives the layout with the head apart, and notes."""
    layout = split_classifier(whole, classifier)
    own = backbone.state_dict()
    wrong = differences(layout.backbone, {k: tuple(v.shape) for k, v in own.items()})
    if wrong:
        others = [name + ("" if s == "imagenet" else f" --stem {s}") for name, s in fitting_architectures(whole)]
        held = _few(list(layout.backbone)) or "nothing"
        advice = f"it fits {', '.join(others)}" if others else f"no architecture known here has these layers: {held}"
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        shown = f"{arch}" + ("" if stem == "imagenet" else f" --stem {stem}")
        raise CheckpointError(f"{contents.path} is no {shown}: {', '.join(wrong[:3])}{more}; {advice}")
    counters = [k for k in own if k not in layout.backbone]
    own.update(layout.backbone)  # this very dict: it holds the versions that MNASNet asks for
    backbone.load_state_dict(own)
    return layout, [f"{len(counters)} {COUNTER} are not in the file and start at 0"] * bool(counters)


def _epoch(contents: Contents) -> int | None:
    epoch = contents.entries.get("epoch")
    return epoch if isinstance(epoch, int) else None


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
