"""t-SNE of a static view set: a figure of all images, and one of a single class with its views.

fastssl eval tsne VIEWSET -a ARCH --pretrained CHECKPOINT --pic-name NAME [--zoomin]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.manifold import TSNE

from fastssl.arguments import positive, positive_float
from fastssl.command import run_command
from fastssl.data_prep.files import check_writable, written_whole
from fastssl.eval.options import finish_options, launch, make_parser
from fastssl.eval.session import Session, run_session
from fastssl.eval.tsne_figures import draw_class, draw_space, save_figure
from fastssl.eval.view_set import collect_views, first_rows, open_view_set, samples_per_class

SAMPLES = 100  # of a class at most
PARTS = ("Y0", "Y1", "Y2", "labels")  # coordinates of originals and views, classes of the samples


def make_tsne_parser() -> argparse.ArgumentParser:
    """The flags of the small-model project's t-SNE script, and ours."""
    p = make_parser("tsne", "t-SNE figures of a static view set.", batch_size=128, data="static view set")
    add = p.add_argument
    add("--pic-name", default="tsne.pdf", metavar="NAME", help="prefix of the files written (default tsne.pdf)")
    add("--perplexity", type=positive_float, default=30.0, metavar="P", help="perplexity of t-SNE (default 30)")
    add("--paint", action="store_true", help="only draw the figures again, from the .npy files")
    add("--zoomin", action="store_true", help="add an inset around the tightest triangle")
    add("--classes", type=positive, default=10, metavar="N", help="show the first N classes (default 10)")
    add(
        "-s",
        "--sample-per-class",
        type=positive,
        metavar="N",
        help=f"show the first N images of each (default {SAMPLES})",
    )
    return p


def evaluate(session: Session) -> dict:
    """Computes the coordinates (or with --paint loads them) and draws the figures. t-SNE itself runs on rank 0."""
    o = session.options
    if session.ranks.rank == 0:
        check_writable(f"{o.pic_name}.full_rep.pdf", "--pic-name")
    found = None if o.paint else features_to_show(session)
    if session.ranks.rank != 0:
        return {}
    coordinates = load_coordinates(o.pic_name) if o.paint else embed(session, *found)
    files = save_figure(draw_space(coordinates), f"{o.pic_name}.full_rep")
    files += save_figure(draw_class(coordinates, zoom=o.zoomin), f"{o.pic_name}.auged_rep")
    return {"files": files, "samples": len(coordinates["Y0"])}


def features_to_show(session: Session) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Unit features of the originals, first and second views of the samples shown, three of (n, C), and labels (n,)."""
    o = session.options
    views = open_view_set(o, session.ranks)
    views = views.take(views.labels < o.classes)
    views = views.take(first_rows(views.labels, samples_per_class(views, o.sample_per_class, SAMPLES)))
    check_perplexity(o.perplexity, 3 * len(views.labels))
    backbone = session.open_backbone()
    session.say("=> iterating through the dataset...")
    return collect_views(session, backbone, views, (0, 1, 2)), views.labels


def check_perplexity(perplexity: float, points: int) -> None:
    """Raises ValueError unless the perplexity is below the number of points."""
    if perplexity >= points:
        raise ValueError(f"--perplexity {perplexity:g} must be below the number of images shown, {points}: lower it")


def embed(session: Session, features: list[torch.Tensor], labels: torch.Tensor) -> dict[str, np.ndarray]:
    """t-SNE of all features together, after PCA to 50 dimensions; also saved as <pic-name>.<part>.npy."""
    o = session.options
    x = torch.cat(features).double().cpu()
    x = x - x.mean(0)
    _, _, v = torch.linalg.svd(x, full_matrices=False)
    session.say("=> t-SNE optimization starts.")
    tsne = TSNE(perplexity=o.perplexity, init="pca", random_state=o.seed % 2**32)  # scikit-learn takes 32 bits
    y = tsne.fit_transform((x @ v[:50].T).numpy())
    session.say(f"=> final error: {tsne.kl_divergence_:.4f}.")
    coordinates = dict(zip(PARTS, [*np.split(y, 3), labels.numpy()]))
    for name, array in coordinates.items():
        with written_whole(Path(f"{o.pic_name}.{name}.npy")) as partial, open(partial, "wb") as file:
            np.save(file, array)
    return coordinates


def load_coordinates(pic_name: str) -> dict[str, np.ndarray]:
    """Loads what `embed` saved. Raises ValueError when it is not there."""
    try:
        return {name: np.load(f"{pic_name}.{name}.npy", allow_pickle=False) for name in PARTS}
    except FileNotFoundError as error:
        raise ValueError(
            f"--paint draws saved coordinates, but {error.filename} does not exist: run once without --paint"
        ) from None


def main(argv: Sequence[str]) -> int:
    """`fastssl eval tsne`."""
    options = finish_options(make_tsne_parser().parse_args(launch(argv, "fastssl.eval.tsne")))
    return run_session("tsne", options, evaluate)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
