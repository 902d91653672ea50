"""The encoder that is evaluated, from --pretrained."""

from __future__ import annotations

import pickle
from typing import NamedTuple

import torch
from torch import nn

from fastssl.models.encoders import make_encoder

_PREFIXES = ("_orig_mod.", "module.", "encoder_q.", "backbone.")


class Report(NamedTuple):
    """What a checkpoint turned out to be."""

    arch: str
    text: str

    def __str__(self) -> str:
        return self.text


def open_pretrained(path: str, arch: str | None = None) -> tuple[nn.Module, Report]:
    """(backbone in eval mode on the CPU, what was recognised) of a checkpoint of ours, MoCo's, or a state dict.

    arch: None takes what the checkpoint names, else resnet50. Raises ValueError when the file is missing or unsafe to
    load, or its layers are not those of the architecture.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"there is no checkpoint {path}") from None
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors and is not opened: it could run code") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint: {str(error).splitlines()[0][:200]}") from error
    config = state.get("config") if isinstance(state.get("config"), dict) else {}
    arch = arch or config.get("arch") or state.get("arch") or "resnet50"
    weights = state.get("model") or state.get("state_dict") or state
    backbone = make_encoder(arch, stem=config.get("stem", "imagenet")).backbone
    wanted, found = backbone.state_dict(), _query_encoder(weights)
    missing = [k for k in wanted if k not in found]
    wrong = [k for k in wanted if k in found and found[k].shape != wanted[k].shape]
    unexplained = [k for k in found if k not in wanted and not k.startswith(("fc.", "head.", "classifier."))]
    if problem := (missing or wrong or unexplained):
        kind = "lacks" if missing else "has another shape of" if wrong else "also has"
        raise ValueError(f"{path} does not fit -a {arch}: it {kind} {', '.join(problem[:3])}")
    backbone.load_state_dict({k: found[k] for k in wanted})
    return backbone.eval(), Report(arch, f"{path}: loaded {len(wanted)} tensors of {arch}")


def _query_encoder(weights: dict) -> dict[str, torch.Tensor]:
    """Tensors of the query encoder by their names in the backbone; of another key, as it is."""
    names = [k for k, v in weights.items() if isinstance(v, torch.Tensor)]
    if any("encoder_q." in k for k in names):
        names = [k for k in names if "encoder_q." in k]
    found = {}
    for name in names:
        short = name
        while prefix := next((p for p in _PREFIXES if short.startswith(p)), None):
            short = short[len(prefix) :]
        found[short] = weights[name]
    return found
