"""Verifies an exported file: a new process loads it strictly, with the library it is meant for; features must agree."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from fastssl.foreign import load_pretrained
from fastssl.foreign.read import read_weights
from fastssl.models.encoders import find_classifier

TOLERANCE = 1e-4  # of the largest feature


def largest_difference(source: str, out: str, to: str, name: str, arch: str, stem: str, key: str, head: bool) -> float:
    """The largest difference between the features (with `head`: the head's outputs), divided by the largest feature.

    source, key: what was exported; out, to, name: the file, its format and the architecture's name in that format.
    Raises ValueError when the file does not load, or differs by more than TOLERANCE.
    """
    module = load_pretrained(source, arch, key=key, with_head=head, stem=stem)[0]
    side = image_side(module, stem)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "features.pt"
        words = [out, to, name, stem, str(int(head)), str(side), str(result)]
        command = [sys.executable, "-m", "fastssl.verify_export", *words]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise ValueError(f"{out} does not load as {to} {name}: {lines[-1][:300]}")
        found = torch.load(result, weights_only=True)
    expected = compute(module, side)
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:
        raise ValueError(f"{out} loads, but its features differ by {difference:.1e} of the largest: do not use it")
    return difference


def image_side(module: nn.Module, stem: str) -> int:
    """Side in pixels of the test images: timm's input size for its own models, since some accept no other."""
    if stem == "cifar":
        return 32
    settings = getattr(getattr(module, "backbone", module), "pretrained_cfg", None)
    return settings["input_size"][1] if settings else 224


def compute(module: nn.Module, side: int) -> Tensor:
    """The module's output for two fixed random images."""
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return module.eval()(images)


def load_as(out: str, to: str, name: str, stem: str, head: bool) -> nn.Module:
    """The exported file, loaded by torchvision or timm itself, or else by fastssl."""
    if to in ("plain", "moco"):
        return load_pretrained(out, name, with_head=head, stem=stem)[0]
    tensors = read_weights(out).tensors if out.endswith(".safetensors") else torch.load(out, weights_only=True)
    if to == "timm":
        import timm

        model = timm.create_model(name, pretrained=False, num_classes=1000)  # some have no classifier by default
    else:
        import torchvision.models as tv

        auxiliary = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
        model = tv.get_model(name, weights=None, **auxiliary)
    classifier, linear = find_classifier(model)
    outputs = tensors[f"{classifier}.weight"].shape[0] if head else 0
    model.set_submodule(classifier, nn.Linear(linear.in_features, outputs) if head else nn.Identity())
    model.load_state_dict(tensors, strict=True)
    return model


if __name__ == "__main__":
    out, to, name, stem, head, side, result = sys.argv[1:]
    torch.save(compute(load_as(out, to, name, stem, head == "1"), int(side)), result)
