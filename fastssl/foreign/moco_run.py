"""The whole state of a run of main_moco.py, or of the scripts that descend from it, by our names: --resume goes on."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from fastssl.checkpoint import CheckpointError
from fastssl.foreign.formats import trained_places
from fastssl.foreign.layout import strip_wrappers
from fastssl.foreign.load import load_pretrained
from fastssl.foreign.read import Contents, read_weights

_STATE = {"queue", "queue_ptr"}


class MoCoRun(NamedTuple):
    """What such a script saves after an epoch."""

    epochs: int  # that are done
    head: str
    model: dict[str, Tensor]  # the state dict of our MoCo
    optimizer: dict  # SGD's state dict, of the parameters that are trained


def find_moco_run(path: str | Path) -> Contents | None:
    """The file's contents where it is such a checkpoint, with all that a run needs to go on; None for any other."""
    try:
        contents = read_weights(path)
    except CheckpointError:
        return None
    names = strip_wrappers(contents.tensors)
    encoders = {name.split(".")[0] for name in names} >= {"encoder_q", "encoder_k"}
    entries = isinstance(contents.entries.get("epoch"), int) and isinstance(contents.entries.get("optimizer"), dict)
    return contents if encoders and names.keys() >= _STATE and entries else None


def read_moco_run(contents: Contents, arch: str, stem: str) -> MoCoRun:
    """The state in a file that `find_moco_run` found. Raises CheckpointError where it is not of this architecture."""
    path, model = contents.path, {}
    for key, encoder in (("q", "encoder_q"), ("k", "encoder_k")):
        module, report = load_pretrained(path, arch, key=key, with_head=True, stem=stem)
        model |= {f"{encoder}.{name}": tensor for name, tensor in module.state_dict().items()}
    tensors = strip_wrappers(contents.tensors)
    model |= {"queue": tensors["queue"].T.contiguous(), "queue_ptr": tensors["queue_ptr"]}
    optimizer = _of_trained(contents.entries["optimizer"], *trained_places(arch, len(module.head.state_dict())))
    if optimizer is None:
        raise CheckpointError(f"{path} holds no SGD state of {arch}: --restart starts from its weights alone")
    return MoCoRun(contents.entries["epoch"], report.head, model, optimizer)


def _of_trained(optimizer: dict, trained: list[int], count: int) -> dict | None:
    """SGD's state of all parameters of both encoders, cut down to those trained; None where it is another's."""
    groups, state = optimizer.get("param_groups"), optimizer.get("state")
    if not groups or len(groups) != 1 or "dampening" not in groups[0] or len(groups[0]["params"]) != count:
        return None
    keys = [groups[0]["params"][place] for place in trained]  # an id each, where torch is old
    kept = {i: state[key] for i, key in enumerate(keys) if key in state}
    return {"state": kept, "param_groups": [{**groups[0], "params": list(range(len(keys)))}]}
