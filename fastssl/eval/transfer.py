"""Transfer to CIFAR-10, CIFAR-100 or Caltech-101: a classifier on unit-length features, frozen or fine-tuned.

fastssl eval transfer DIR --dataset cifar10 -a ARCH --pretrained CHECKPOINT [--finetune --lr 0.1]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing

from fastssl.command import run_command
from fastssl.eval.bicubic import bicubic_crop_view, bicubic_eval_view
from fastssl.eval.classifier import check_single_images, open_encoder
from fastssl.eval.features import View
from fastssl.eval.linear import evaluate_cached, make_classifier, make_train_view, output_folder
from fastssl.eval.linear_train import Protocol, train_classifier
from fastssl.eval.options import add_training_flags, check_training_flags, finish_options, launch, make_parser
from fastssl.eval.session import Session, run_session
from fastssl.eval.transfer_data import DATASETS, open_transfer_data

LINE = " * Acc@1 {acc1:.3f} Acc@5 {acc5:.3f}"
FROZEN = "transfer: unit-length features, bicubic RandomResizedCrop (.6, 1) and flip, SGD, best epoch"
FINETUNED = "transfer, fine-tuned: bicubic RandomResizedCrop (.2, 1) and flip, SGD on all weights, best epoch"


def make_transfer_parser() -> argparse.ArgumentParser:
    """The flags of main_transfer.py and ours."""
    p = make_parser(
        "transfer",
        "Linear or fine-tuned accuracy on another data set.",
        batch_size=256,
        data="torchvision's files, or train/<class>/ and test/<class>/ folders",
    )
    p.add_argument("--dataset", choices=DATASETS, default="cifar10", help="data set to classify (default cifar10)")
    p.add_argument("--finetune", action="store_true", help="also train the backbone")
    p.add_argument(
        "--finetune-mode",
        choices=("train", "reference"),
        default="train",
        help="with --finetune: train in train mode (train), or from the second epoch on in eval mode, as the reference "
        "script does (reference) (default train)",
    )
    add_training_flags(p, print_freq=10)
    return p


def evaluate(session: Session) -> dict:
    """Trains and validates by the protocol that --protocol names."""
    o = session.options
    train, test = open_transfer_data(session)
    with closing(train), closing(test):
        view = bicubic_view(session)
        if o.protocol == "cached":
            result = evaluate_cached(session, train, test, view, unit_length=True, line=LINE)
            return {"dataset": o.dataset, **result}
        backbone = open_encoder(session)
        model = make_classifier(session, backbone, test, view, len(train.class_names), unit_length=True)
        protocol = Protocol(
            make_train_view(session, (0.2, 1.0) if o.finetune else (0.6, 1.0), bicubic_crop_view),
            view,
            LINE,
            drop=0.2 if o.finetune else 0.1,
            finetune=o.finetune,
            eval_after_first=o.finetune_mode == "reference",
        )
        if o.finetune and not o.evaluate:
            check_single_images(model, train.num_images, o, session.ranks)
        folder = output_folder(o, "transfer", o.dataset + ("-finetune" if o.finetune else ""))
        result = train_classifier(session, model, train, test, protocol, folder)
        name = f"{FINETUNED} ({o.finetune_mode} mode)" if o.finetune else FROZEN
        return {"dataset": o.dataset, "protocol": name, **result, "bad_images": session.warn_bad(train, test)}


def bicubic_view(session: Session) -> View:
    """The view for validation: CIFAR's images are resized whole, others to a short side of --resize, then cropped."""
    o = session.options
    resize = o.image_size if o.dataset.startswith("cifar") else o.resize
    return lambda batch: bicubic_eval_view(batch, o.image_size, resize, session.dtype)


def check(options: argparse.Namespace) -> None:
    """Raises ValueError for flags that contradict each other."""
    check_training_flags(options)
    if options.finetune and options.protocol == "cached":
        raise ValueError("--finetune cannot use cached features: leave out --protocol cached")
    if options.finetune and options.precision == "fp16" and not options.evaluate:
        raise ValueError("--finetune cannot train in fp16, whose small gradients become 0: use --precision bf16")


def main(argv: Sequence[str]) -> int:
    """`fastssl eval transfer`."""
    parser = make_transfer_parser()
    words = launch(argv, "fastssl.eval.transfer", node_batch=parser.get_default("batch_size"))
    options = finish_options(parser.parse_args(words))
    check(options)
    return run_session("transfer", options, evaluate)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
