"""Instance discrimination: does an image find its view among all images?

fastssl eval instdisc VIEWSET -a ARCH --pretrained CHECKPOINT -s 50 --topk 5 --mode d-sd
"""

from __future__ import annotations

import argparse
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
from fastssl.eval.view_set import MODES, collect_views, open_view_set, samples_per_class

QUERY_AND_POSITIVE = {"d-sd": (0, 1), "sd-sd": (1, 2)}  # columns of the view set
SAMPLES = 100  # of a chunk
_ROWS = 512  # queries compared at once
_EQUAL = 1e-13  # float64 products this near are those of equal rows


def make_instdisc_parser() -> argparse.ArgumentParser:
    """The flags of the small-model project's instance discrimination script, and ours."""
    p = make_parser("instdisc", "Instance discrimination on a static view set.", batch_size=128, data="static view set")
    p.add_argument("-s", "--sample-per-class", type=positive, metavar="N", help=f"images per chunk (default {SAMPLES})")
    p.add_argument("--topk", type=positive, default=5, metavar="K", help="report Acc@1 to Acc@K (default 5)")
    p.add_argument(
        "--mode",
        choices=tuple(QUERY_AND_POSITIVE),
        default="d-sd",
        help="find the view of an original (d-sd), or the second view of a first (sd-sd) (default d-sd)",
    )
    p.add_argument(
        "--dataset-mode",
        choices=(*MODES, "all"),
        default="normal",
        help="which files of the set are the views (normal); all: each choice in turn",
    )
    return p


def evaluate(session: Session) -> dict:
    """Evaluates each --dataset-mode and prints a line for it."""
    o = session.options
    session.say(o.data)
    backbone, images, results = session.open_backbone(), None, {}
    for mode in MODES if o.dataset_mode == "all" else (o.dataset_mode,):
        views = open_view_set(o, session.ranks, mode, images)
        images = views.images
        samples = samples_per_class(views, o.sample_per_class, SAMPLES)
        check_topk(o.topk, len(views.files))
        session.say("=> iterating through the dataset...")
        query, positive_view = collect_views(session, backbone, views, QUERY_AND_POSITIVE[o.mode])
        session.say("=> iterating through the representations...")
        above = count_above_over_ranks(query, positive_view, session.ranks)
        accuracy = chunk_accuracy(above, o.topk, samples, every_second(samples, o.data))
        results[mode] = accuracy
        session.say(
            f"Masked: {mode}; Mode: {o.mode}; Top1-{o.topk}: {[round(a, 6) for a in accuracy]}; "
            f"CKPT: {o.pretrained}; Dataset: {o.data}"
        )
    return {"mode": o.mode, "samples": len(query), "accuracy": results}


def every_second(samples: int, data: str) -> bool:
    """Whether to skip every second chunk, as the reference does to compare training images with fewer held-out ones."""
    return samples == 50 and "auged-train" in data


def check_topk(topk: int, samples: int) -> None:
    """Raises ValueError when there are fewer than `topk` samples."""
    if topk > samples:
        raise ValueError(f"there are fewer than --topk {topk} samples: choose --topk from 1 to {samples}")


def count_above_over_ranks(query: Tensor, positive_view: Tensor, ranks: Ranks) -> Tensor:
    """`count_above` with all queries (n, C) as negatives: (n,) int64 on the CPU. Each rank counts for some of them."""
    q, p = (x.tensor_split(ranks.world_size)[ranks.rank] for x in (query, positive_view))
    return torch.cat(gather_objects(count_above(q, p, query).cpu(), ranks))


@torch.no_grad()
def count_above(query: Tensor, positive_view: Tensor, negatives: Tensor, rows: int = _ROWS) -> Tensor:
    """How many negatives lie nearer to each query than its positive, by dot product: (N,) int64.

    query, positive_view: (N, C), negatives: (M, C), float32. Rows with a negative within float32 rounding of the
    positive are counted again in float64. Equal products do not count.
    """
    noise = 2e-7 * (8 + query.shape[1] ** 0.5)
    counts = []
    for q, p in zip(query.split(rows), positive_view.split(rows)):
        with full_float32(q.device):
            product = q @ negatives.T
        level = (q.double() * p.double()).sum(1)  # the positives' products
        above = (product > (level + noise).float()[:, None]).sum(1)
        unsure = (product > (level - noise).float()[:, None]).sum(1) != above
        for part in unsure.nonzero()[:, 0].split(64):
            if len(part):
                exact = torch.stack([(q[i].double() * negatives.double()).sum(1) for i in part])
                above[part] = (exact > level[part, None] + _EQUAL).sum(1)
        counts.append(above)
    return torch.cat(counts)


def chunk_accuracy(above: Tensor, topk: int, samples: int, every_second_chunk: bool = False) -> list[float]:
    """Acc@1 to Acc@topk in percent: of a chunk of `samples` rows, the share with at most k above; then their mean.

    At most k, not k - 1, since the query is among its own negatives and always above (unless equal to the positive).
    """
    chunks = above.split(samples)[:: 2 if every_second_chunk else 1]
    return [sum(100 * float((c <= k).double().mean()) for c in chunks) / len(chunks) for k in range(1, topk + 1)]


def main(argv: Sequence[str]) -> int:
    """`fastssl eval instdisc`."""
    options = make_instdisc_parser().parse_args(launch(argv, "fastssl.eval.instdisc"))
    return run_session("instdisc", finish_options(options), evaluate)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
