"""`fastssl export`: an encoder for other programs, from any checkpoint that can be read.

fastssl export runs/first resnet18.pth                          the newest checkpoint; names of our backbone
fastssl export step_000010000.pt encoder.safetensors --head
fastssl export step_000010000.pt resnet18.pth --to torchvision  also timm
fastssl export step_000010000.pt old.pth.tar --to moco          for the scripts of MoCo and its descendants
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from fastssl import checkpoint
from fastssl.foreign import Report, load_pretrained
from fastssl.foreign.formats import (
    FORMATS,
    counterpart,
    moco_checkpoint,
    moco_optimizer,
    name_tensors,
    old_queue,
)
from fastssl.foreign.layout import strip_wrappers
from fastssl.foreign.read import Contents, read_weights
from fastssl.models import Encoder
from fastssl.verify_export import largest_difference

_SUFFIXES = ("", ".safetensors", ".pth", ".pt", ".tar", ".ckpt", ".bin")  # all but one: what torch.save writes


def export(source: str, out: str, to: str = "plain", *, arch: str | None = None, stem: str | None = None,
           key: str = "q", head: bool = False, force: bool = False) -> tuple[Report, str]:  # fmt: skip
    """Writes the encoder of `source` (a file, or a run folder) to `out`; gives what was read and the name it has there.

    `out` ends in .safetensors, or is a torch.save file of a plain state dict, or of MoCo's checkpoint. Written whole
    or not at all. Raises ValueError for a format that cannot hold this encoder exactly, and where `out` exists.
    """
    path = checkpoint.find(source)
    if Path(out).is_dir():
        raise ValueError(f"{out} is a folder: name a file in it")
    if Path(out).suffix not in _SUFFIXES:
        raise ValueError(
            f"{out} would hold what torch.save writes, weights and no graph: name a .safetensors file or one of "
            f"{' '.join(_SUFFIXES[2:])}; torch.onnx.export makes ONNX from the module"
        )
    if Path(out).exists() and not force:
        raise ValueError(f"{out} exists: --force replaces it")
    if to == "moco" and out.endswith(".safetensors"):
        raise ValueError("--to moco holds more than tensors: name a .pth.tar file")
    contents = read_weights(path)
    module, report = load_pretrained(
        path, arch, key=key, with_head=head or has_head(path, arch, key, stem, to), stem=stem
    )
    name = counterpart(report.arch, report.stem, to)
    if to == "moco":
        checkpoint.save(_to_moco(contents, report, module, path, key), Path(out))
    else:
        backbone, projection = _parts(module)
        tensors = OrderedDict(name_tensors(report.arch, to, backbone, projection))
        tensors._metadata = backbone._metadata  # torchvision's MNASNet asks for its version
        save_tensors(tensors, Path(out), {"format": "pt", "arch": report.arch, "stem": report.stem})
    return report, name


def has_head(path: Path, arch: str | None, key: str, stem: str | None, to: str) -> bool:
    """MoCo's layout keeps the head wherever there is one that is known."""
    return to == "moco" and load_pretrained(path, arch, key=key, stem=stem)[1].dim is not None


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """A state dict as .safetensors or by torch.save, whole or not at all."""
    for name, tensor in tensors.items():
        tensors[name] = tensor.detach().clone().contiguous()
    if path.suffix != ".safetensors":
        checkpoint.save(tensors, path)
        return
    from safetensors.torch import save

    checkpoint.write_whole(path, lambda file: file.write(save(tensors, metadata)))


def _parts(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    if isinstance(module, Encoder):
        return module.backbone.state_dict(), module.head.state_dict()
    return module.state_dict(), {}


def _to_moco(contents: Contents, report: Report, module: nn.Module, path: Path, key: str) -> dict:
    """All of MoCo's state that the file has: with the query encoder asked for, the key encoder and the queue too."""
    query, head = _parts(module)
    tensors = strip_wrappers(contents.tensors)
    whole = report.kind.endswith("the query encoder") and "the key encoder" in report.left_out
    whole = whole and {"queue", "queue_ptr"} <= tensors.keys()
    others: list = [None, None, None, None]
    if whole:
        other, _ = load_pretrained(path, report.arch, key="k", with_head=bool(head), stem=report.stem)
        own = report.kind.startswith("fastssl")
        queue = old_queue(tensors["queue"]) if own else tensors["queue"]
        optimizer = contents.entries.get("optimizer")
        if own and isinstance(optimizer, dict):
            optimizer = moco_optimizer(report.arch, head, optimizer)
        others = [name_tensors(report.arch, "moco", *_parts(other)), queue, tensors["queue_ptr"], optimizer]
    key_tensors, queue, pointer, optimizer = others
    named = name_tensors(report.arch, "moco", query, head)
    return moco_checkpoint(report.arch, named, key_tensors, queue, pointer, _epoch(contents, report), optimizer)


def _epoch(contents: Contents, report: Report) -> int:
    """Epochs done: as the file says, or its steps over the steps of an epoch."""
    entries = contents.entries
    if report.epoch is not None or "num_images" not in entries:
        return report.epoch or 0
    return int(entries["step"]) // max(1, int(entries["num_images"]) // int(entries["config"]["batch_size"]))


def main(argv: Sequence[str]) -> int:
    """`fastssl export`."""
    parser = argparse.ArgumentParser(
        "fastssl export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", help="a checkpoint of any project that can be read, or a run folder")
    parser.add_argument("out", help="the file to write: .safetensors, or .pth")
    parser.add_argument("--to", choices=FORMATS, default="plain", help="whose names the tensors get (default: ours)")
    parser.add_argument("-a", "--arch", help="architecture, where the file does not tell")
    parser.add_argument("--stem", choices=("imagenet", "cifar"), help="stem, where the file does not tell")
    parser.add_argument("--key", choices=("q", "k"), default="q", help="query or key encoder (default: q)")
    parser.add_argument("--head", action="store_true", help="keep the projection head, or the linear classifier")
    parser.add_argument("--verify", action="store_true", help="load the file in a new process and compare features")
    parser.add_argument("--force", action="store_true", help="replace the file")
    o = parser.parse_args(list(argv))
    report, name = export(o.source, o.out, o.to, arch=o.arch, stem=o.stem, key=o.key, head=o.head, force=o.force)
    print(report)
    print(f"{o.out}: {o.to} names, {name}")
    if o.verify:
        source = str(checkpoint.find(o.source))
        difference = largest_difference(source, o.out, o.to, name, report.arch, report.stem, o.key, o.head)
        print(f"verified: loaded strictly in a new process, features differ by at most {difference:.1e} of their size")
    return 0
