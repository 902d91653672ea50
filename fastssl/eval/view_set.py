"""A static view set: folders <class>/ with <stem>-0.jpeg (the original), -1 and -2 (its views), up to -10 (masked)."""

from __future__ import annotations

import argparse
import re
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastssl.augment.views import make_eval_view
from fastssl.batch import ImageBatch
from fastssl.distributed import Ranks
from fastssl.eval.features import View, collect_features, eval_view, gather_features
from fastssl.eval.images import Images, open_images, rank_batches
from fastssl.eval.session import Session

MODES = {  # which files are the original and its two views
    "normal": (0, 1, 2),
    "g-mask": (0, 3, 4),
    "rand-g-mask": (0, 5, 6),
    "avg-mask": (0, 7, 8),
    "rand-avg-mask": (0, 9, 10),
}
_NAME = re.compile(r"(.+)-(\d+)\.jpe?g", re.IGNORECASE | re.DOTALL)  # DOTALL: a file name may hold a newline


class ViewSet(NamedTuple):
    """n samples, sorted by class and name; each is an original and two views of it."""

    images: Images
    files: Tensor  # (n, 3) int64, indices into images of (original, view 1, view 2)
    labels: Tensor  # (n,) int64, ascending
    class_names: list[str]

    def take(self, rows: Tensor) -> ViewSet:
        """Only these samples."""
        return self._replace(files=self.files[rows], labels=self.labels[rows])


def open_view_set(
    options: argparse.Namespace, ranks: Ranks, mode: str = "normal", images: Images | None = None
) -> ViewSet:
    """The samples of the folder, with the views of `mode`. images: the folder, if it is open already.

    Raises ValueError for files whose names are not those of a view set, and for a sample that lacks a file.
    """
    images = images or open_images(options.data, options, ranks)
    folder = getattr(images, "folder", None)
    if folder is None:
        raise ValueError(f"{options.data} is not a folder of image files: make a view set with fastssl prep views")
    wanted, found = MODES[mode], {}
    for i, path in enumerate(folder.paths):
        match = _NAME.fullmatch(path)
        if not match:
            raise ValueError(
                f"{folder.path(i)} is not named <stem>-<number>.jpeg, as in a static view set: make one with "
                "fastssl prep views"
            )
        found.setdefault((int(folder.labels[i]), match[1]), {})[int(match[2])] = i
    samples = sorted(found)
    missing = [(name, number) for label, name in samples for number in wanted if number not in found[label, name]]
    if missing:
        name, number = missing[0]
        raise ValueError(
            f"{folder.root}/{name}-{number}.jpeg is missing, so mode {mode} is incomplete: make the view set "
            "again with fastssl prep views"
        )
    files = torch.tensor([[found[sample][number] for number in wanted] for sample in samples])
    return ViewSet(images, files, torch.tensor([label for label, _ in samples]), images.class_names)


def collect_views(session: Session, backbone: torch.nn.Module, views: ViewSet, which: tuple[int, ...]) -> list[Tensor]:
    """Features (n, C) float32 of unit length, on every rank: one tensor for each column of `views.files` in `which`.

    Originals (column 0) are resized and cropped, views (1, 2) are used as they are.
    Raises ValueError for a file that cannot be read.
    """
    shares = rank_batches(len(views.files), session.options.batch_size, session.ranks)
    found = []
    for column in which:
        view = eval_view(session) if column == 0 else uncropped_view(session)
        batches = [views.files[share, column] for share in shares]
        features, _ = collect_features(
            session, backbone, views.images, view, transform=normalize, batches=batches,
            what="originals" if column == 0 else f"views {column}",
        )  # fmt: skip
        if bad := list(views.images.bad_images):
            raise ValueError(f"{bad[0]}: make the view set again with fastssl prep views")
        session.memory.check(4 * len(views.files) * features.shape[1] * len(which), "features of a view set")
        found.append(gather_features(session, features)[:].to(session.ranks.device, torch.float32))
    return found


def uncropped_view(session: Session) -> View:
    """Only normalises: the views of a view set were cropped when they were made."""

    def view(batch: ImageBatch) -> Tensor:
        sides = torch.unique(torch.stack([batch.height, batch.width]))
        if len(sides) != 1:
            raise ValueError(
                f"views must be squares of one size, but have sides of {sides.tolist()} pixels: make the view set "
                "again with fastssl prep views"
            )
        side = int(sides)
        return make_eval_view(batch, side, side, session.dtype)

    return view


def check_per_class(views: ViewSet, wanted: int) -> None:
    """Raises ValueError when a class has fewer than `wanted` samples."""
    counts = np.bincount(views.labels.numpy())
    if counts.min() < wanted:
        name = views.class_names[int(counts.argmin())]
        raise ValueError(f"class {name} has fewer than {wanted} samples: use -s {counts.min()}")


def samples_per_class(views: ViewSet, asked: int | None, default: int) -> int:
    """`asked`, which every class must have, or if that is None the `default`, which classes need not have.

    Raises ValueError as `check_per_class`.
    """
    if asked is not None:
        check_per_class(views, asked)
    return asked or default


def first_rows(labels: Tensor, samples: int) -> Tensor:
    """The rows of the first `samples` images of every class (all, if it has fewer) of (n,) ascending labels."""
    return torch.cat([(labels == c).nonzero()[:samples, 0] for c in torch.unique(labels)])
