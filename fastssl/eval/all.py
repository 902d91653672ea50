"""Every evaluation from one pass over the images: k-NN, cached linear, instance discrimination, statistics, t-SNE.

fastssl eval all DIR --views VIEWSET -a ARCH --pretrained CHECKPOINT --json all.json --figure all
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing

from torch import Tensor

from fastssl.arguments import numbers, positive, positive_float
from fastssl.command import run_command
from fastssl.data_prep.files import check_writable
from fastssl.distributed import gather_objects
from fastssl.eval import instdisc, knn, stats, tsne
from fastssl.eval.all_figure import draw_page
from fastssl.eval.compute import slices
from fastssl.eval.features import collect_features, eval_view
from fastssl.eval.images import open_splits
from fastssl.eval.linear import LINE
from fastssl.eval.linear_sweep import CACHED, run_sweep
from fastssl.eval.memory import Rows
from fastssl.eval.options import finish_options, launch, make_parser
from fastssl.eval.search import knn_over_ranks
from fastssl.eval.session import Session, run_session
from fastssl.eval.tsne_figures import save_figure
from fastssl.eval.view_set import check_per_class, collect_views, first_rows, open_view_set
from fastssl.eval.vote import REP_SPACES, odd_ks, to_rep_space


def make_all_parser() -> argparse.ArgumentParser:
    """The flags of the single evaluations, which mean here what they mean there."""
    p = make_parser("all", __doc__.splitlines()[0], batch_size=256, data="folder with train and val, as for knn")
    add = p.add_argument
    add("--views", metavar="DIR", help="static view set; without one, only k-NN and linear run")
    add("-k", "--k", type=positive, default=101, metavar="K", help="k-NN: largest k (default 101)")
    add("--rep-space", choices=REP_SPACES, default="norm", help="k-NN: see knn (default norm)")
    add("--epochs", type=positive, default=100, metavar="N", help="linear: epochs of training (default 100)")
    add("--schedule", type=int, nargs="*", default=[60, 80], metavar="N", help="linear: epochs at which the rate drops")
    add(
        "--lrs", type=numbers, default=[0.1, 0.3, 1.0, 3.0, 10.0, 30.0], metavar="A,B,..", help="linear: learning rates"
    )
    add("--wds", type=numbers, default=[0.0], metavar="A,B,..", help="linear: weight decays (default 0)")
    add(
        "-s",
        "--sample-per-class",
        type=positive,
        default=50,
        metavar="N",
        help="view set: images per class (default 50)",
    )
    add("--topk", type=positive, default=5, metavar="K", help="instance discrimination: largest k (default 5)")
    add("--perplexity", type=positive_float, default=30.0, metavar="P", help="t-SNE: perplexity (default 30)")
    add("--figure", default="all", metavar="NAME", help="draw the results to NAME.pdf and NAME.png (default all)")
    p.set_defaults(momentum=0.9, classes=10)  # what the linear sweep and t-SNE also ask for
    return p


def evaluate(session: Session) -> dict:
    """Runs all evaluations; rank 0 draws the page of figures."""
    o = session.options
    if session.ranks.rank == 0:
        check_writable(f"{o.figure}.pdf", "--figure")
    train, val = open_splits(o, session.ranks)
    views = open_view_set(argparse.Namespace(**{**vars(o), "data": o.views}), session.ranks) if o.views else None
    if views:
        check_per_class(views, o.sample_per_class)
        rows = first_rows(views.labels, o.sample_per_class)
        shown = rows[views.labels[rows] < o.classes]
        tsne.check_perplexity(o.perplexity, 3 * len(shown))
        instdisc.check_topk(o.topk, len(views.labels))
    backbone, view, result = session.open_backbone(), eval_view(session), {}
    with closing(train), closing(val):
        bank, queries = (
            collect_features(session, backbone, images, view, batches=knn.batches_of(session, images), what=what)
            for images, what in ((train, "train"), (val, "val"))
        )
        result["knn"] = find_neighbours(session, bank, queries)
        session.say(f"best-NN={result['knn']['best']:3.2f}%, k={result['knn']['best_k']}.")
        result["linear"] = {"protocol": CACHED, **run_sweep(session, bank, queries, len(train.class_names), LINE)}
        result["bad_images"] = session.warn_bad(train, val)
    coordinates = None
    if views:
        found = collect_views(session, backbone, views, (0, 1, 2))
        result["instdisc"] = discriminate(session, found)
        result["stats"] = stats.report(session, o.views, *(x[rows.to(x.device)] for x in found), views.labels[rows])
        if session.ranks.rank == 0:
            coordinates = tsne.embed(session, [x[shown.to(x.device)] for x in found], views.labels[shown])
    if session.ranks.rank == 0:
        result["figures"] = save_figure(draw_page(result, coordinates), o.figure)
    return result


def find_neighbours(session: Session, bank: tuple[Rows, Tensor], queries: tuple[Rows, Tensor]) -> dict:
    """k-NN in the space of --rep-space. bank, queries: the encoder's own features (n, C), and labels (n,)."""
    o = session.options
    bank = transform_rows(session, bank[0], o.rep_space), bank[1]
    queries = transform_rows(session, queries[0], o.rep_space), queries[1]
    most = sum(gather_objects(len(bank[0]), session.ranks))
    if o.k > most:
        session.note(f"k-NN: k up to {most}, as there are fewer than -k {o.k} training images")
    answers = knn_over_ranks(*bank, *queries, odd_ks(min(o.k, most)), session.ranks, session.memory, session.bar)
    return {"rep_space": o.rep_space, **knn.describe(session, answers)}


def transform_rows(session: Session, rows: Rows, rep_space: str) -> Rows:
    """A copy of the rows in another representation space, transformed batch by batch as `knn` does it."""
    copy = session.memory.make_rows(*rows.shape)
    for part in slices(len(rows), session.options.batch_size):
        copy[part] = to_rep_space(rows[part].float(), rep_space)
    return copy


def discriminate(session: Session, views: list[Tensor]) -> dict[str, list[float]]:
    """Instance discrimination: Acc@1 to Acc@topk in percent, for both modes."""
    o, found = session.options, {}
    for mode, (query, positive_view) in instdisc.QUERY_AND_POSITIVE.items():
        above = instdisc.count_above_over_ranks(views[query], views[positive_view], session.ranks)
        every_second = instdisc.every_second(o.sample_per_class, o.views)
        found[mode] = instdisc.chunk_accuracy(above, o.topk, o.sample_per_class, every_second)
        session.say(f"Masked: normal; Mode: {mode}; Top1-{o.topk}: {[round(a, 6) for a in found[mode]]}")
    return found


def main(argv: Sequence[str]) -> int:
    """`fastssl eval all`."""
    options = make_all_parser().parse_args(launch(argv, "fastssl.eval.all"))
    options.pic_name = options.figure
    return run_session("all", finish_options(options), evaluate)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
