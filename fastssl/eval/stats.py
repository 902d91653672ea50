"""Alignment, uniformity and alignment within classes, of originals (D) and of their views (SD).

fastssl eval stats VIEWSET -a ARCH --pretrained CHECKPOINT -s 50
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl.arguments import positive
from fastssl.command import run_command
from fastssl.distributed import Ranks, gather_objects
from fastssl.eval.compute import full_float32
from fastssl.eval.options import finish_options, launch, make_parser
from fastssl.eval.session import Session, run_session
from fastssl.eval.view_set import check_per_class, collect_views, first_rows, open_view_set
from fastssl.loaders.order import epoch_order

T = 2.0  # the t of uniformity (Wang & Isola, arXiv 2005.10242)
SUBSETS, SUBSET = 3, 128  # the reference's uniformity: how many subsets, rows in each
COLUMNS = ("D-SD align", "SD-SD align", "D cls-align", "SD cls-align", "D uniform", "SD uniform")
_TILE = 2048


def make_stats_parser() -> argparse.ArgumentParser:
    """The flags of the small-model project's statistics script, and ours."""
    p = make_parser("stats", "Alignment and uniformity on a static view set.", batch_size=128, data="static view set")
    p.add_argument(
        "-s", "--sample-per-class", type=positive, default=50, metavar="N", help="images per class (default 50)"
    )
    return p


def evaluate(session: Session) -> dict:
    """The reference's table, and uniformity over all pairs."""
    o = session.options
    views = open_view_set(o, session.ranks)
    check_per_class(views, o.sample_per_class)
    views = views.take(first_rows(views.labels, o.sample_per_class))
    backbone = session.open_backbone()
    session.say("=> iterating through the dataset...")
    original, view1, view2 = collect_views(session, backbone, views, (0, 1, 2))
    return report(session, o.data, original, view1, view2, views.labels)


def report(session: Session, data: str, original: Tensor, view1: Tensor, view2: Tensor, labels: Tensor) -> dict:
    """Prints and returns all statistics of the view set `data`, from unit features (n, C) and labels (n,)."""
    o = session.options
    session.say("=> calculating instance-level alignment...")
    values = [alignment(original, view1), alignment(view1, view2)]
    session.say("=> calculating class-level alignment...")
    values += [class_alignment(x, labels) for x in (original, view1)]
    session.say("=> calculating instance-level uniformity...")
    values += [subset_uniformity(x, o.seed) for x in (original, view1)]
    session.say(f"{o.pretrained},{data}")
    session.say("".join(f"{name:<15}" for name in COLUMNS))
    session.say("".join(f"{value:<15.4f}" for value in values))
    everything = [uniformity(x, session.ranks) for x in (original, view1)]
    session.say("all pairs: D uniform {:.4f}, SD uniform {:.4f}".format(*everything))
    return {
        **dict(zip(COLUMNS, values)),
        "D uniform, all pairs": everything[0],
        "SD uniform, all pairs": everything[1],
        "samples": len(original),
        "classes": len(torch.unique(labels)),
    }


def alignment(x: Tensor, y: Tensor) -> float:
    """Mean squared distance between the rows of x and y, both (n, C) of unit length: 2 - 2 mean(x.y)."""
    return 2 - 2 * float((x.double() * y.double()).sum(1).mean())


def class_alignment(x: Tensor, labels: Tensor) -> float:
    """Mean squared distance over the pairs of a class, averaged over the classes that have pairs; NaN if none has.

    In a class of n, the squared distances of all pairs sum to n sum |x_i|^2 - |sum x_i|^2.
    """
    means = []
    for label in torch.unique(labels):
        rows = x[(labels == label).to(x.device)].double()
        n = len(rows)
        if n > 1:
            total = n * rows.square().sum() - rows.sum(0).square().sum()
            means.append(float(total) / (n * (n - 1) / 2))
    return sum(means) / len(means) if means else math.nan


def subset_uniformity(x: Tensor, seed: int) -> float:
    """The reference's uniformity: the mean over 3 disjoint random subsets of 128 rows, chosen by the seed.

    With fewer rows the last subset is smaller. If that would leave it without a pair, the subsets are thirds of all
    rows instead; below 6 rows there is only one subset.
    """
    order = epoch_order(len(x), seed, 0)
    size = SUBSET if len(x) >= (SUBSETS - 1) * SUBSET + 2 else len(x) // SUBSETS
    subsets = order[: SUBSETS * size].split(size) if size > 1 else [order]
    return sum(uniformity(x[rows.to(x.device)]) for rows in subsets) / len(subsets)


@torch.no_grad()
def uniformity(x: Tensor, ranks: Ranks | None = None, tile: int = _TILE) -> float:
    """log mean exp(-T |x_i - x_j|^2) over all pairs i < j of unit rows (n, C); NaN with fewer than two rows.

    The pairs are computed in tiles, which the ranks share. Products and exponentials are float32, sums float64.
    """
    n, total = len(x), x.new_zeros((), dtype=torch.float64)
    if n < 2:
        return math.nan
    rank, world_size = (ranks.rank, ranks.world_size) if ranks else (0, 1)
    pairs = [(i, j) for i in range(0, n, tile) for j in range(i, n, tile)]
    for i, j in pairs[rank::world_size]:
        with full_float32(x.device):
            weight = x[i : i + tile] @ x[j : j + tile].T
        weight.sub_(1).mul_(2 * T).exp_()  # |x - y|^2 = 2 - 2 x.y
        total += (weight.triu_(1) if i == j else weight).sum(dtype=torch.float64)
    total = sum(gather_objects(float(total), ranks)) if ranks else float(total)
    return math.log(total / (n * (n - 1) / 2))


def main(argv: Sequence[str]) -> int:
    """`fastssl eval stats`."""
    options = make_stats_parser().parse_args(launch(argv, "fastssl.eval.stats"))
    return run_session("stats", finish_options(options), evaluate)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
