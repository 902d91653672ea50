"""A linear classifier on a backbone: its initialisation, validation and checkpoints."""

from __future__ import annotations

import argparse
import copy
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

from fastssl import checkpoint
from fastssl.distributed import Ranks, gather_objects
from fastssl.eval.features import View, encode
from fastssl.eval.images import Images, rank_batches
from fastssl.eval.session import Session
from fastssl.foreign.heads import Normalise
from fastssl.foreign.layout import strip_wrappers
from fastssl.foreign.read import Contents, read_weights
from fastssl.models.tryout import why_refused


class Classifier(nn.Module):
    """`fc(backbone(images))`: (B, 3, S, S) -> (B, classes). As in MoCo's protocol, fc ~ N(0, 0.01) with zero bias."""

    def __init__(self, backbone: nn.Module, feature_dim: int, num_classes: int, seed: int, unit_length: bool) -> None:
        super().__init__()
        self.backbone = backbone
        linear = nn.Linear(feature_dim, num_classes)
        linear.weight.data, linear.bias.data = initial_weights(feature_dim, num_classes, seed)
        self.fc = nn.Sequential(Normalise(), linear) if unit_length else linear

    def forward(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Float32 logits (B, classes). dtype: the backbone's, by autocast; the classifier always runs in float32."""
        return self.fc(encode(self.backbone, images, dtype))

    def export_state(self) -> dict[str, Tensor]:
        """The weights under the reference scripts' names: module.<name in the backbone> and module.fc.*."""
        state = {f"module.{name}": tensor for name, tensor in self.backbone.state_dict().items()}
        return state | {f"module.fc.{name}": tensor for name, tensor in self.fc.state_dict().items()}

    def import_state(self, state: dict[str, Tensor]) -> None:
        """Loads what `export_state` gave, or the reference scripts on one --gpu, whose names lack `module.`.

        Raises ValueError when it came from another model.
        """
        own = {name: f"backbone.{name}" for name in self.backbone.state_dict()}
        named = OrderedDict((own.get(name, name), tensor) for name, tensor in strip_wrappers(state).items())
        named._metadata = self.state_dict()._metadata  # MNASNet refuses a state dict without its version
        shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
        for name, tensor in self.state_dict().items():
            if shapes.pop(name, None) != tuple(tensor.shape):
                raise ValueError(f"--resume must name a checkpoint of the same encoder and classes: its {name} differs")
        if shapes:
            raise ValueError(f"--resume must name a checkpoint of the same encoder: it also has {next(iter(shapes))}")
        self.load_state_dict(named)


def read_classifier(path: str) -> Contents:
    """The content of a checkpoint of a classifier. Raises ValueError when it is something else."""
    contents = read_weights(path)
    if lacking := [name for name in ("epoch", "best_acc1", "optimizer") if name not in contents.entries]:
        raise ValueError(
            f"{path} is not a checkpoint of a linear evaluation (it lacks {', '.join(lacking)}): give one that this "
            "command wrote"
        )
    return contents


def open_encoder(session: Session) -> nn.Module:
    """The encoder of --pretrained or, without one, that of the classifier which --resume goes on with."""
    o = session.options
    if o.resume:
        read_classifier(o.resume)  # raises errors
    return session.open_backbone(o.pretrained or o.resume)


def check_single_images(model: Classifier, num_images: int, o: argparse.Namespace, ranks: Ranks) -> None:
    """Raises ValueError if an epoch's last batch leaves a rank one image, and the encoder cannot train on one."""
    rest = num_images % o.batch_size or o.batch_size
    if 1 not in [len(part) for part in torch.arange(rest).tensor_split(ranks.world_size)]:
        return
    encoder = copy.deepcopy(model.backbone).train()
    # by batch norm, when its maps have shrunk to a pixel
    if reason := why_refused(encoder, 1, o.image_size, str(ranks.device)):
        raise ValueError(
            f"the last batch of {num_images:,} images leaves a rank a single one, on which {o.arch} cannot be "
            f"fine-tuned at {o.image_size} pixels ({reason}): choose another --batch-size"
        )


def initial_weights(feature_dim: int, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight (classes, C) from N(0, 0.01), drawn by the seed, and a bias (classes,) of zeros."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_classes, feature_dim, generator=generator) * 0.01, torch.zeros(num_classes)


def count_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """In how many rows of logits (B, classes) the label comes first, and among the first five: (2,) int64."""
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return torch.stack([top[:, 0].sum(), top.sum()])


@torch.no_grad()
def validate(session: Session, model: Classifier, images: Images, view: View) -> tuple[float, float]:
    """(Acc1, Acc5) in percent over all images, which the ranks share. Leaves the model in eval mode."""
    model.eval()
    device = session.ranks.device
    hits, num = torch.zeros(2, dtype=torch.int64, device=device), 0
    batches = rank_batches(images.num_images, session.options.batch_size, session.ranks)
    for batch in session.bar(images.read(iter(batches)), len(batches), "val"):
        hits += count_hits(model(view(batch.to(device)), session.dtype), batch.label.to(device))
        num += batch.size
    counts = gather_objects((*hits.tolist(), num), session.ranks)
    first, five, num = (sum(column) for column in zip(*counts))
    if not num:
        raise ValueError("none of the held-out images can be read: check the files of that split")
    return 100 * first / num, 100 * five / num


class Keeper:
    """Rank 0 writes checkpoint_<epoch>.pth.tar, of which only the newest is kept, and model_best.pth.tar.

    resume: the checkpoint that the training goes on from. If it is one of these, it gives way to the next like them.
    """

    def __init__(self, folder: Path, ranks: Ranks, resume: str = "") -> None:
        self.folder, self.writes = folder, ranks.rank == 0
        own = Path(resume).resolve().parent == folder.resolve() and Path(resume).name.startswith("checkpoint_")
        self.last = folder / Path(resume).name if own else None

    def save(self, state: dict, epoch: int, best: bool) -> None:
        """Writes the state after `epoch` (counted from 0); best: as model_best.pth.tar, too."""
        if not self.writes:
            return
        path = self.folder / f"checkpoint_{epoch:04d}.pth.tar"
        if best:  # first: once a checkpoint tells --resume of this accuracy, only a better one is written here
            checkpoint.save(state, self.folder / "model_best.pth.tar")
        checkpoint.save(state, path)
        if self.last and self.last != path:
            self.last.unlink(missing_ok=True)
        self.last = path
