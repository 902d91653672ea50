"""Which architecture a file means: what it says where that fits, else the only one that has its names and shapes."""

from __future__ import annotations

import contextlib
import json

from fastssl.checkpoint import CheckpointError
from fastssl.foreign.fit import few, fits, fitting_architectures, signature
from fastssl.foreign.layout import Layout
from fastssl.foreign.read import Contents
from fastssl.models.encoders import list_architectures

# Pairs with the same names and shapes that compute differently: by their padding, or the number of attention heads.
_TWINS = {f"tf_efficientnet_b{i}": f"timm:efficientnet_b{i}" for i in range(4)}
_TWINS["mocov3_vit_small"] = "timm:vit_small_patch16_224"  # DINO's
# With those of timm that pool before they stride, so rare that a file which does not name one is taken for another.
_RIVALS = {*_TWINS.values(), "timm:resnetaa50", "timm:resnetblur18", "timm:resnetblur50", "timm:efficientnet_blur_b0"}
_PROJECTS = {"MoCo v3": "mocov3_vit_small", "DINO": _TWINS["mocov3_vit_small"]}  # their vit_small


def choose(contents: Contents, layout: Layout, arch: str | None, stem: str | None) -> tuple[str, str]:
    """(architecture, stem): as given, else what the file means if that fits, else the only ones that fit.

    Raises CheckpointError when none fits, or several that compute differently.
    """
    said_stem = _entry(contents, "stem") or "imagenet"
    if arch is not None:
        return arch, stem or next((name for name in (said_stem, "cifar") if fits(layout, arch, name)), said_stem)
    said = _said(contents)
    for name in said or _of_project(layout):
        for choice in dict.fromkeys([stem or said_stem, stem or "imagenet"]):
            if fits(layout, name, choice):
                return name, choice
    found = fitting_architectures(layout, stem)
    if len(found) == 1 and found[0][0] not in _TWINS:
        return found[0]
    if not found and said:
        return said[0], stem or "imagenet"  # the loader then says what does not fit
    if not found:
        raise CheckpointError(
            f"{contents.path} ({layout.kind} of {few(list(layout.backbone))}) fits no architecture known here: name "
            "one with -a, as timm:NAME, or save the encoder alone"
        )
    fitting = []
    for found_arch, _ in found:
        fitting.append(found_arch)
        if found_arch in _TWINS:
            fitting.append(_TWINS[found_arch])
    raise CheckpointError(f"{contents.path} fits {' and '.join(fitting)}, which compute differently: name one with -a")


def doubt(contents: Contents, layout: Layout, arch: str, stem: str) -> list[str]:
    """A note where the file means another network than `arch`, and either cannot be it or computes differently."""
    names = _said(contents) or _of_project(layout)
    if arch in names or not names:
        return []
    meant = next((name for name in names if fits(layout, name, stem)), None)
    if meant is None:
        return [f"the file says {names[0]}, but its tensors are those of {arch}"]
    differs = not _RIVALS.isdisjoint((meant, arch))
    return [f"the file means {meant}, which computes differently from {arch}"] if differs else []


def is_told_by_tensors(arch: str, stem: str) -> bool:
    """Whether a file that holds the tensors alone is taken for this network, or for one that computes the same."""
    told = arch not in _TWINS and arch not in _RIVALS
    return told and (stem == "imagenet" or signature(arch, stem).shapes != signature(arch).shapes)


def _said(contents: Contents) -> list[str]:
    """The architectures that a file may mean by the name it gives, ours before timm's; none if we do not know it."""
    said = _entry(contents, "arch") or _said_beside(contents)
    timms = f"timm:{said.partition('.')[0]}"  # without timm's tag: resnetaa50.a1h_in1k
    known = said in list_architectures() or said.startswith("timm:")
    return [said] * known + [timms] * (timms in _RIVALS)


def _of_project(layout: Layout) -> list[str]:
    """What a project's vit_small is."""
    return [vit for project, vit in _PROJECTS.items() if layout.kind.startswith(f"{project} ")]


def _entry(contents: Contents, name: str) -> str:
    config = contents.entries.get("config")
    own = config if isinstance(config, dict) else contents.entries
    return own[name] if isinstance(own.get(name), str) else ""


def _said_beside(contents: Contents) -> str:
    """The architecture in the config.json that Hugging Face has beside timm's weights, or ""."""
    with contextlib.suppress(OSError, ValueError):
        config = json.loads(contents.path.with_name("config.json").read_text())
        if isinstance(config, dict) and isinstance(config.get("architecture"), str):
            return config["architecture"]
    return ""
