"""Reads a file of weights without running anything in it: torch.save files of any age, and safetensors."""

from __future__ import annotations

import argparse
import collections
import re
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastssl.checkpoint import CheckpointError

# Where projects put the weights in a checkpoint, in the order they are looked for.
_WEIGHTS = ("state_dict", "model", "model_state_dict", "net")
_NETWORKS = ("student", "teacher")  # or one dict for each of the two, as DINO
# How torch names, in what it raises, the code it met: a class, a function, a blocked module's, a whole program.
_CODE = re.compile(
    r"GLOBAL (\S+) was not an allowed global|Unsupported class (\S+)|unsupported GLOBAL (\S+)|(TorchScript)"
    r"|(the legacy \.tar format)"
)
# Weights of other types are quantised: without their scales they mean nothing.
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Contents(NamedTuple):
    """What a file holds."""

    path: Path
    tensors: dict[str, Tensor]  # the weights, on the CPU, under the names in the file
    entries: dict[str, object]  # what lies beside them: epoch, arch, optimizer, config, ...


def read_weights(path: str | Path) -> Contents:
    """The weights of a checkpoint or a bare state dict.

    Raises CheckpointError for a missing or damaged file, for one that holds code, and where there are no weights.
    """
    path = Path(path)
    if not path.is_file():
        is_folder = f"{path} is a folder: name a checkpoint in it, such as RUN/checkpoints/step_000001000.pt"
        raise CheckpointError(is_folder if path.is_dir() else f"there is no checkpoint {path}")
    loaded, entries = _read_safetensors(path) if _is_safetensors(path) else (_read_torch(path), {})
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not weights by name: save model.state_dict()")
    if not is_weights(loaded):
        loaded = _join_networks(loaded)
        name = next((n for n in _WEIGHTS if is_weights(loaded.get(n))), None)
        if name is None:
            held = ", ".join(map(str, list(loaded)[:8])) or "nothing"
            raise CheckpointError(f"{path} holds no weights under {', '.join(_WEIGHTS)}; it holds {held}")
        entries = {str(k): v for k, v in loaded.items() if k != name}
        loaded = loaded[name]
    odd = next((k for k, v in loaded.items() if v.layout != torch.strided or v.is_meta), None)
    if odd is not None:
        raise CheckpointError(f"{path}: {odd} is sparse or has no values: save plain tensors, .to_dense()")
    odd = next((k for k, v in loaded.items() if v.dtype not in _FLOATS and _must_be_float(k, v)), None)
    if odd is not None:
        raise CheckpointError(f"{path}: {odd} holds {loaded[odd].dtype}, no weights as they are: save them as float32")
    broken = next((k for k, v in loaded.items() if v.is_floating_point() and not v.isfinite().all()), None)
    if broken is not None:
        raise CheckpointError(f"{path}: {broken} holds values that are not finite: take an earlier checkpoint")
    return Contents(path, dict(loaded), entries)


def _must_be_float(name: str, tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex() or name.endswith((".weight", ".bias"))


def is_weights(value: object) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _join_networks(loaded: dict) -> dict:
    """DINO's checkpoint with both networks in one state dict, as others save them."""
    networks = {name: loaded[name] for name in _NETWORKS if is_weights(loaded.get(name))}
    if not networks:
        return loaded
    others = {k: v for k, v in loaded.items() if k not in networks}
    return {"state_dict": {f"{n}.{k}": v for n, tensors in networks.items() for k, v in tensors.items()}, **others}


def _is_safetensors(path: Path) -> bool:
    """By its first bytes, a length and JSON: a downloaded file may have any name."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{" or path.suffix == ".safetensors"


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {str(error).splitlines()[0][:200]}") from None


def _read_torch(path: Path) -> object:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch.load itself would read flipped bits without a word
            if damaged:
                raise CheckpointError(f"{path} is damaged: {damaged} fails its checksum")
        with torch.serialization.safe_globals(_harmless()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # it is refused below, by a sentence
            return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:
        text = str(error)
        found = _CODE.search(text)
        if found or "Unsupported operand" in text:  # torch reads without running anything what torch.save writes
            held = next(filter(None, found.groups())) if found else "a pickle that torch.save does not write"
            raise CheckpointError(
                f"{path} holds {held}, which loading would run as code: refused; where "
                "you trust it, load it by its own program and keep its weights alone: torch.save(state_dict, NEW)"
            ) from None
        # torch's own advice, to load all the same, is not ours
        reason = text.partition("WeightsUnpickler error:")[2].strip() or text or type(error).__name__
        raise CheckpointError(f"{path} is damaged or no checkpoint: {reason.splitlines()[0][:200]}") from error


def _harmless() -> list:
    """Types that old checkpoints hold beside their weights (arguments, the best accuracy) and that run nothing."""
    scalar = (np._core if hasattr(np, "_core") else np.core).multiarray.scalar  # numpy 2, numpy 1
    names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    numbers = [type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"]
    return [argparse.Namespace, collections.defaultdict, np.dtype, *names, *dict.fromkeys(numbers)]
