"""Reads a file of weights without running anything in it: torch.save files of any age, and safetensors."""

from __future__ import annotations

import argparse
import pickletools
import re
import warnings
import zipfile
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastssl.checkpoint import CheckpointError

# The entries in which projects keep the weights of a checkpoint, in the order in which they are looked for.
_WEIGHTS = ("state_dict", "model", "model_state_dict", "net")
_NETWORKS = ("student", "teacher")  # DINO keeps one entry for each of these instead
# How torch's errors name the code in a file: a class, a function, something of a blocked module, a whole program.
_CODE = re.compile(
    r"GLOBAL (\S+) was not an allowed global|Unsupported class (\S+)|unsupported GLOBAL (\S+)|(TorchScript)"
    r"|(the legacy \.tar format)"
)
# Weights of other types are quantised, and mean nothing without their scales.
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Contents(NamedTuple):
    """What a file holds."""

    path: Path
    tensors: dict[str, Tensor]  # the weights, on the CPU, under the names in the file
    entries: dict[str, object]  # the other entries: epoch, arch, optimizer, config, ...


def read_weights(path: str | Path) -> Contents:
    """The weights of a checkpoint or a bare state dict.

    Raises CheckpointError for a missing or damaged file, for one that holds code, and for one without weights.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: name a checkpoint in it, as RUN/checkpoints/step_000001000.pt")
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    loaded, entries = _read_safetensors(path) if _is_safetensors(path) else (_read_torch(path), {})
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not named weights: save model.state_dict()")
    if not is_weights(loaded):
        loaded = _join_networks(loaded)
        name = next((n for n in _WEIGHTS if is_weights(loaded.get(n))), None)
        if name is None:
            held = ", ".join(map(str, list(loaded)[:8])) or "nothing"
            raise CheckpointError(f"{path} holds no weights under {', '.join(_WEIGHTS)}: it holds {held}")
        entries = {str(k): v for k, v in loaded.items() if k != name}
        loaded = loaded[name]
    _check_values(path, loaded)
    return Contents(path, dict(loaded), entries)


def _check_values(path: Path, weights: dict[str, Tensor]) -> None:
    for name, tensor in weights.items():
        if tensor.layout != torch.strided or tensor.is_meta:
            raise CheckpointError(f"{path}: {name} is sparse or has no values: save plain tensors (.to_dense())")
    for name, tensor in weights.items():
        if tensor.dtype not in _FLOATS and _must_be_float(name, tensor):
            raise CheckpointError(f"{path}: {name} is of type {tensor.dtype}: save weights in float32")
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {name} holds values that are not finite: take an earlier checkpoint")


def _must_be_float(name: str, tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex() or name.endswith((".weight", ".bias"))


def is_weights(value: object) -> bool:
    """Whether this is a state dict: tensors by name, at least one."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _join_networks(loaded: dict) -> dict:
    """DINO's checkpoint with both networks in one state dict, as others save them; any other as it is."""
    networks = {name: loaded[name] for name in _NETWORKS if is_weights(loaded.get(name))}
    if not networks:
        return loaded
    joined = {f"{name}.{k}": v for name, tensors in networks.items() for k, v in tensors.items()}
    return {"state_dict": joined, **{k: v for k, v in loaded.items() if k not in networks}}


def _is_safetensors(path: Path) -> bool:
    """Tells by the first bytes, a length and then JSON, since a downloaded file may have any name."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{" or path.suffix == ".safetensors"


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        reason = str(error).splitlines()[0][:200]
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {reason}") from None


def _read_torch(path: Path) -> object:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch.load itself does not notice flipped bits
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
        if found or ("Unsupported operand" in text and _is_pickle(path)):
            held = next(filter(None, found.groups())) if found else "a pickle that torch cannot read safely"
            raise CheckpointError(
                f"{path} holds {held}, which would run as code if it were loaded: if you trust the "
                "file, load it with its own program and save only the weights, with torch.save(state_dict, NEW)"
            ) from None
        # without torch's own advice, which is to load the file all the same
        reason = text.partition("WeightsUnpickler error:")[2].strip() or text or type(error).__name__
        if "Unsupported operand" in text or isinstance(error, EOFError):  # a web page, Git LFS's pointer, nothing
            start = _read_start(path)
            reason = f"it begins with {start}" if start else "it is empty"
        raise CheckpointError(f"{path} is damaged or not a checkpoint: {reason.splitlines()[0][:200]}") from error


def _read_start(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(32)


def _is_pickle(path: Path) -> bool:
    """Is it one to its end, or an archive of one, and not bytes that only begin like it? Runs nothing in it."""
    if zipfile.is_zipfile(path):
        return True
    try:
        with open(path, "rb") as file:
            return sum(1 for _ in pickletools.genops(file)) > 0
    except Exception:  # it says of bytes that are no pickle whatever they make it stumble over
        return False


def _harmless() -> list:
    """Types that old checkpoints hold beside their weights (arguments, the best accuracy), and that run no code."""
    own = (np._core if hasattr(np, "_core") else np.core).multiarray  # numpy 2, numpy 1
    functions = {"scalar": own.scalar, "_reconstruct": own._reconstruct}
    names = [(f, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core") for name, f in functions.items()]
    # VICReg's optimizer keeps this function of its script among its options
    names += [(_nothing, f"{script}.exclude_bias_and_norm") for script in ("__main__", "main_vicreg")]
    # of paths, those that need not be of this system
    names += [(PurePath, f"{m}.{kind}Path") for m in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")]
    numbers = [type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdSU"]
    names += [(_make_dict, "collections.defaultdict")]  # torch fills nothing else
    return [argparse.Namespace, dict, list, np.ndarray, np.dtype, *names, *dict.fromkeys(numbers)]


def _make_dict(_: object = None) -> dict:
    return {}


def _nothing(*_: object) -> None:
    """Stands for a function that a file names."""
