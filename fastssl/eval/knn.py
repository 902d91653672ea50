"""Best-NN: exact k-nearest neighbours, every odd k from one pass.

fastssl eval knn DIR -a ARCH --pretrained CHECKPOINT -k 101 -g 8 --rep-space norm
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from torch import Tensor

from fastssl.arguments import positive
from fastssl.command import run_command
from fastssl.eval.features import collect_features, eval_view
from fastssl.eval.images import Images, open_splits, shuffled_batches
from fastssl.eval.nearest import TORCH
from fastssl.eval.options import finish_options, launch, make_parser
from fastssl.eval.search import Answers, check_ks, knn_over_ranks
from fastssl.eval.session import Session, run_session
from fastssl.eval.vote import REP_SPACES, SHIFTED, TEMPERATURE, odd_ks, to_rep_space


def make_knn_parser() -> argparse.ArgumentParser:
    """The flags of the small-model project's k-NN script, and ours."""
    p = make_parser(
        "knn",
        "Exact k-nearest-neighbour accuracy of frozen features, for k = 1, 3, ..., K.",
        batch_size=512,
        data="folder with train and val: class folders, tar shards or .beton files",
    )
    p.add_argument(
        "-k", "--k", type=positive, default=5, metavar="K", help="largest k; tries 1, 3, ... up to K (default 5)"
    )
    p.add_argument(
        "--rep-space",
        choices=REP_SPACES,
        default="original",
        help="which features are compared: the encoder's own (original), scaled to unit length (norm), or first "
        "shifted by the mean of their batch of -b random images (shift-norm, shifted-norm) (default original)",
    )
    p.epilog = f"-g N (or --gpus N): N processes, one on each GPU. {p.epilog}"  # taken by `launch`, not parsed here
    return p


def evaluate(session: Session) -> dict:
    """Computes the features of both splits, then the accuracy for every k."""
    o = session.options
    train, val = open_splits(o, session.ranks)
    check_ks([o.k], train.num_images, val.num_images)  # before anything is computed
    backbone, view = session.open_backbone(), eval_view(session)
    to_space = partial(to_rep_space, rep_space=o.rep_space)
    bank, queries = (
        collect_features(
            session, backbone, images, view, transform=to_space, batches=batches_of(session, images), what=what
        )
        for images, what in ((train, "train"), (val, "val"))
    )
    answers = knn_over_ranks(*bank, *queries, odd_ks(o.k), session.ranks, session.memory, session.bar)
    bad = session.warn_bad(train, val)
    result = describe(session, answers)
    session.say(f"best-NN={result['best']:3.2f}%, k={result['best_k']}.")
    session.say(
        f"weighted (temperature {TEMPERATURE}): best-NN={result['weighted_best']:3.2f}%, k={result['weighted_best_k']}."
    )
    return {"rep_space": o.rep_space, **result, "bad_images": bad}


def batches_of(session: Session, images: Images) -> list[Tensor] | None:
    """For the spaces that are shifted by the mean of a batch, this rank's batches of shuffled images, as in the script.

    In the order of the folders a batch would be of one class or a few, whose mean is what tells them from others.
    """
    o = session.options
    if o.rep_space not in SHIFTED:
        return None
    return shuffled_batches(images.num_images, o.batch_size, session.ranks, o.seed)


def describe(session: Session, answers: Answers) -> dict:
    """The results for the JSON: accuracies in percent by k, the best of each vote, and the smallest k that gives it."""
    if TORCH in answers.search and session.ranks.device.type == "cpu":
        session.note("numba is not installed, so k-NN took about twice as long: pip install numba")
    best_k = max(answers.majority, key=answers.majority.get)
    weighted_k = max(answers.weighted, key=answers.weighted.get)
    return {
        "best": answers.majority[best_k],
        "best_k": best_k,
        "accuracy": answers.majority,
        "weighted_best": answers.weighted[weighted_k],
        "weighted_best_k": weighted_k,
        "weighted_accuracy": answers.weighted,
        "temperature": TEMPERATURE,
        "bank": answers.bank,
        "queries": answers.queries,
        "search": answers.search,
    }


def main(argv: Sequence[str]) -> int:
    """`fastssl eval knn`."""
    argv = launch(argv, "fastssl.eval.knn", counts_gpus=True)
    return run_session("knn", finish_options(make_knn_parser().parse_args(argv)), evaluate)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
