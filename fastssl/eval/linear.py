"""Linear evaluation: a classifier on frozen features.

fastssl eval linear DIR -a ARCH --pretrained CHECKPOINT [--protocol cached --lrs 1,3,10,30 --wds 0,1e-6]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import torch
from torch import nn

from fastssl.augment.params import sample_params
from fastssl.augment.policy import make_policy
from fastssl.augment.views import make_crop_view
from fastssl.batch import ImageBatch
from fastssl.command import run_command
from fastssl.eval.classifier import Classifier, open_encoder
from fastssl.eval.features import View, collect_features, encode, eval_view
from fastssl.eval.images import Images, open_splits
from fastssl.eval.linear_sweep import CACHED, run_sweep
from fastssl.eval.linear_train import Protocol, TrainView, train_classifier
from fastssl.eval.options import add_training_flags, check_training_flags, finish_options, launch, make_parser
from fastssl.eval.session import Session, run_session

LINE = " * Acc1 {acc1:.3f} Acc5 {acc5:.3f}"
REFERENCE = "reference: RandomResizedCrop and flip each epoch, SGD, best epoch on the held-out split"


def make_linear_parser() -> argparse.ArgumentParser:
    """The flags of main_lincls.py and ours."""
    p = make_parser(
        "linear",
        "Linear classification accuracy on frozen features.",
        batch_size=256,
        data="folder with train and val: class folders, tar shards or .beton files",
    )
    add_training_flags(p, print_freq=50)
    return p


def evaluate(session: Session) -> dict:
    """Trains and validates by the protocol that --protocol names."""
    train, val = open_splits(session.options, session.ranks)
    with closing(train), closing(val):
        if session.options.protocol == "cached":
            return evaluate_cached(session, train, val, eval_view(session))
        backbone = open_encoder(session)
        model = make_classifier(session, backbone, val, eval_view(session), len(train.class_names))
        protocol = Protocol(make_train_view(session, (0.08, 1.0)), eval_view(session), LINE)
        result = train_classifier(session, model, train, val, protocol, output_folder(session.options))
        return {"protocol": REFERENCE, **result, "bad_images": session.warn_bad(train, val)}


def evaluate_cached(
    session: Session, train: Images, val: Images, view: View, *, unit_length: bool = False, line: str = LINE
) -> dict:
    """The cached protocol. unit_length: features are scaled to unit length before the classifier."""
    backbone = session.open_backbone()
    session.say(f"=> protocol {CACHED}")
    transform = nn.functional.normalize if unit_length else nn.Identity()
    train_features = collect_features(session, backbone, train, view, transform=transform, what="train")
    val_features = collect_features(session, backbone, val, view, transform=transform, what="val")
    result = run_sweep(session, train_features, val_features, len(train.class_names), line)
    return {"protocol": CACHED, **result, "bad_images": session.warn_bad(train, val)}


def make_classifier(
    session: Session, backbone: nn.Module, images: Images, view: View, num_classes: int, unit_length: bool = False
) -> Classifier:
    """A classifier with fresh weights on the device. The first image is encoded to count the backbone's features."""
    batch = next(images.read(iter([torch.arange(1)]), replace_bad=True))
    features = encode(backbone.eval(), view(batch.to(session.ranks.device)), session.dtype)
    model = Classifier(backbone, features.shape[1], num_classes, session.options.seed, unit_length)
    return model.to(session.ranks.device)


def make_train_view(session: Session, crop_scale: tuple[float, float], make: Callable = make_crop_view) -> TrainView:
    """RandomResizedCrop and flip as a function of (batch, epoch), the same for every loader and number of ranks.

    make: `make_crop_view`, or a function with the same arguments.
    """
    policy = make_policy("v1", crop_scale=crop_scale, jitter_p=0.0, grey_scale=0.0)
    o = session.options

    def view(batch: ImageBatch, epoch: int) -> torch.Tensor:
        return make(batch, sample_params(policy, batch, o.seed, epoch, 0), o.image_size, session.dtype)

    return view


def output_folder(o: argparse.Namespace, kind: str = "lincls", what: str = "") -> Path:
    """The folder of --output, or the reference's: beside the checkpoint, named after the settings of the training.

    Without --pretrained, --resume goes on where its checkpoint lies.
    """
    if o.output:
        return Path(o.output)
    if o.resume and not o.pretrained:
        return Path(o.resume).parent
    schedule = ",".join(map(str, [*o.schedule, o.epochs])) if o.schedule else f",{o.epochs}"
    base = Path(o.pretrained) if o.pretrained else Path("random")
    return base.parent / kind / base.name / what / f"b{o.batch_size}_lr{o.lr:g}_e{schedule}"


def main(argv: Sequence[str]) -> int:
    """`fastssl eval linear`."""
    parser = make_linear_parser()
    words = launch(argv, "fastssl.eval.linear", node_batch=parser.get_default("batch_size"))
    options = finish_options(parser.parse_args(words))
    check_training_flags(options)
    return run_session("linear", options, evaluate)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
