"""Export an encoder for other programs, from any checkpoint that can be read.

fastssl export runs/first resnet18.pth                          the newest checkpoint of a run, with our own names
fastssl export step_000010000.pt encoder.safetensors --head     with its projection head, as safetensors
fastssl export step_000010000.pt resnet18.pth --to torchvision  with torchvision's names; likewise --to timm
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
from fastssl.foreign.choose import is_told_by_tensors
from fastssl.foreign.formats import FORMATS, counterpart, moco_checkpoint, moco_optimizer, name_tensors
from fastssl.foreign.layout import strip_wrappers
from fastssl.foreign.load import pads_more, with_stem
from fastssl.foreign.read import Contents, read_weights
from fastssl.models import Encoder
from fastssl.verify_export import largest_difference

_SUFFIXES = ("", ".safetensors", ".pth", ".pt", ".tar", ".ckpt", ".bin")  # all but .safetensors: files of torch.save


def export(source: str | Path, out: str | Path, to: str = "plain", *, arch: str | None = None, stem: str | None = None,
           key: str = "q", head: bool = False, force: bool = False,
           scalar_label: bool = False) -> tuple[Report, str]:  # fmt: skip
    """Writes the encoder of `source` (a file or a run folder) to `out`. Returns what was read, and its name in `to`.

    `out` becomes a .safetensors file, or a torch.save file of a plain state dict or, with "moco", of MoCo's checkpoint;
    written whole or not at all. scalar_label: see `moco_checkpoint`; unasked it is written for files that have it, and
    for our runs with the contrastive term beside others. Raises ValueError when the format cannot hold this encoder
    exactly, and when `out` exists without `force`.
    """
    path = checkpoint.find(source)
    if Path(out).is_dir():
        raise ValueError(f"{out} is a folder: name a file in it")
    if Path(out).suffix not in _SUFFIXES:
        raise ValueError(
            f"cannot write {Path(out).suffix} files, only weights: name a .safetensors file or one of "
            f"{' '.join(_SUFFIXES[2:])} (for ONNX, load the module and call torch.onnx.export)"
        )
    if Path(out).exists() and not force:
        raise ValueError(f"{out} exists: add --force to replace it")
    if to == "moco" and Path(out).suffix == ".safetensors":
        raise ValueError("--to moco writes more than tensors: name a .pth.tar file")
    head = head or (to == "moco" and has_known_head(path, arch, key, stem))  # MoCo's layout keeps the head
    module, report = load_pretrained(path, arch, key=key, with_head=head, stem=stem)
    name = counterpart(report.arch, report.stem, to)
    if pads_more(report.kind, report.stem):
        raise ValueError(
            f"weights alone cannot say that solo-learn's first convolution pads 2 pixels: use {path} itself"
        )
    if to == "torchvision" and name.startswith("mnasnet") and Path(out).suffix == ".safetensors":
        raise ValueError(f"torchvision's {name} demands a version, which .safetensors cannot hold: name a .pth file")
    if to == "moco":
        checkpoint.save(_to_moco(read_weights(path), report, module, path, scalar_label), Path(out))
    else:
        backbone, projection = _parts(module)
        tensors = OrderedDict(name_tensors(report.arch, to, backbone, projection))
        tensors._metadata = backbone._metadata  # torchvision's MNASNet asks for its version
        # of two networks whose tensors have timm's names, the file says which it is
        arch = name if (report.arch, to) == ("efficientnet_b0", "timm") else report.arch
        save_tensors(tensors, Path(out), {"format": "pt", "arch": arch, "stem": report.stem})
        if to == "plain" and Path(out).suffix != ".safetensors" and not is_told_by_tensors(arch, report.stem):
            report.notes.append(f"{out} cannot say that it is {with_stem(arch, report.stem)}: a .safetensors file can")
    return report, name


def has_known_head(path: Path, arch: str | None, key: str, stem: str | None) -> bool:
    """Whether the checkpoint has a projection head whose layers are recognised."""
    return load_pretrained(path, arch, key=key, stem=stem)[1].dim is not None


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes a state dict as .safetensors or with torch.save, whole or not at all."""
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


def _to_moco(contents: Contents, report: Report, module: nn.Module, path: Path, scalar_label: bool) -> dict:
    """MoCo's checkpoint: the query encoder and, where the file has all of them, key encoder, queue and optimizer."""
    query, head = _parts(module)
    named = name_tensors(report.arch, "moco", query, head)
    epoch = _epoch(contents, report)
    tensors = strip_wrappers(contents.tensors)
    has_key_encoder = report.kind.endswith("the query encoder") and "the key encoder" in report.left_out
    if not has_key_encoder or not {"queue", "queue_ptr"} <= tensors.keys():
        return moco_checkpoint(report.arch, named, None, None, None, epoch, None)
    encoder_k, _ = load_pretrained(path, report.arch, key="k", with_head=bool(head), stem=report.stem)
    key_tensors = name_tensors(report.arch, "moco", *_parts(encoder_k))
    for reason in ("the key encoder", "the queue", "a constant"):  # it is the query encoder that was read without them
        report.left_out.pop(reason, None)
    queue, optimizer = tensors["queue"], contents.entries.get("optimizer")
    if report.kind.startswith("fastssl"):
        queue = queue.float().T.contiguous()  # (K, D) -> (D, K)
        if isinstance(optimizer, dict):
            optimizer = moco_optimizer(report.arch, head, optimizer)
            if optimizer is None:
                why = "is not plain SGD's: MoCo's scripts cannot --resume, only start from the weights"
                report.notes.append(f"left out the optimizer's state, which {why}")
    scalar_label = scalar_label or "scalar_label" in tensors or _mixes_contrast(contents.entries.get("config"))
    return moco_checkpoint(report.arch, named, key_tensors, queue, tensors["queue_ptr"], epoch, optimizer, scalar_label)


def _mixes_contrast(config: object) -> bool:
    """Whether these are the options of a run of ours that only moco_align_uniform's script could go on with."""
    weights = config if isinstance(config, dict) else {}
    others = weights.get("align_weight", 0) or weights.get("uniform_weight", 0)
    return bool(weights.get("contrast_weight", 0) and others)


def _epoch(contents: Contents, report: Report) -> int:
    """Completed epochs: as the file says, or computed from its steps."""
    entries = contents.entries
    if report.epoch is not None or "num_images" not in entries:
        return report.epoch or 0
    steps_per_epoch = max(1, int(entries["num_images"]) // int(entries["config"]["batch_size"]))
    return int(entries["step"]) // steps_per_epoch


def add_scalar_label(parser: argparse.ArgumentParser) -> None:
    """The flag for what MoCo's layout lacks and moco_align_uniform's has."""
    parser.add_argument(
        "--scalar-label",
        action="store_true",
        help="add the constant that moco_align_uniform's script demands when its contrastive term is on; MoCo's and "
        "ssl-small's refuse it (unasked only when the run had it, or the contrastive term beside others)",
    )


def main(argv: Sequence[str]) -> int:
    """`fastssl export`."""
    parser = argparse.ArgumentParser(
        "fastssl export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", help="a run folder, or a checkpoint of any project that can be read")
    parser.add_argument("out", help="the file to write: .safetensors or .pth")
    parser.add_argument("--to", choices=FORMATS, default="plain", help="names of the tensors (default: plain, our own)")
    parser.add_argument("-a", "--arch", help="the architecture, if the file does not tell")
    parser.add_argument("--stem", choices=("imagenet", "cifar"), help="the stem, if the file does not tell")
    parser.add_argument("--key", choices=("q", "k"), default="q", help="the query or the key encoder (default: q)")
    parser.add_argument("--head", action="store_true", help="keep the projection head or the linear classifier")
    add_scalar_label(parser)
    parser.add_argument("--verify", action="store_true", help="load OUT in a new process and compare the features")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    o = parser.parse_args(list(argv))
    options = dict(arch=o.arch, stem=o.stem, key=o.key, head=o.head, force=o.force, scalar_label=o.scalar_label)
    report, name = export(o.source, o.out, o.to, **options)
    print(report)
    print(f"{o.out}: {o.to} names, {name}")
    if o.verify:
        source = str(checkpoint.find(o.source))
        difference = largest_difference(source, o.out, o.to, name, report.arch, report.stem, o.key, o.head)
        print(f"verified: it loads in a new process, and features differ by at most {difference:.1e} of the largest")
    return 0
