"""The k-NN probe: an evaluation that a training run makes every few epochs, not counted in its time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from fastssl.batch import ImageBatch
from fastssl.config import Config
from fastssl.distributed import Ranks, gather_objects
from fastssl.eval.features import extract_features, share_buffers
from fastssl.eval.images import HELD_OUT, find_held_out
from fastssl.eval.memory import Memory
from fastssl.eval.search import knn_over_ranks
from fastssl.eval.vote import to_rep_space
from fastssl.loaders.make import Loader, make_loader
from fastssl.machine.precision import compute_dtype
from fastssl.random_key import STREAM_HELD_OUT, random_bits
from fastssl.same_on_ranks import check_images

Probe = Callable[[nn.Module], float]
ASKED_OF_TRAIN = 5  # without held-out images, one training image in so many is a query, and not in the bank
_FEWEST = 50  # training images: among so many the hash is sure to choose some
_BATCH = 256


def make_probe(config: Config, loader: Loader, ranks: Ranks) -> tuple[Probe | None, str]:
    """(probe, a sentence for the log that says what it does); the probe is None, and the sentence why, without one.

    `probe(backbone)` is the percentage of held-out images whose --knn-k nearest training images, by unit-length
    features, vote for their class, or NaN if a feature is not finite. Call it on all ranks: they share the work, and
    all get the same number.
    """
    if config.eval.knn_every == 0:
        return None, "no k-NN probe: --knn-every is 0"
    if not loader.class_names:
        return None, "no k-NN probe: it needs classes, and these images are not in class folders"
    if len(loader.class_names) == 1:
        return None, f"no k-NN probe: it needs classes, and all images are in one, {loader.class_names[0]}"
    held_out, found = open_held_out(config, loader, ranks.device)
    check_images(held_out, "held-out", ranks)
    images = min(loader.num_images, config.eval.knn_images)
    if held_out is None and images < _FEWEST:
        return None, f"no k-NN probe: {found}, and there are too few training images to hold some out ({images})"

    def share(part: Loader) -> Iterator[ImageBatch]:
        return keep_labelled(part.eval_batches(_BATCH, ranks.rank, ranks.world_size, config.eval.knn_images))

    def probe(backbone: nn.Module) -> float:
        share_buffers(backbone, ranks)  # a checkpoint holds rank 0's; in training no rank uses any
        if held_out is not None:
            return knn_percent(backbone, share(loader), share(held_out), config, ranks)
        bank, queries = (keep_asked(share(loader), asked) for asked in (False, True))
        return knn_percent(backbone, bank, queries, config, ranks)

    queries = f"the images of {found}"
    if held_out is None:
        queries = f"one training image in {ASKED_OF_TRAIN} by the others, since {found}"
    every = "epoch" if config.eval.knn_every == 1 else f"{config.eval.knn_every} epochs"
    return probe, f"k-NN probe every {every} and at the end: classifies {queries}"


def open_held_out(config: Config, loader: Loader, device: torch.device) -> tuple[Loader | None, str]:
    """(loader of the held-out images, where they are), or (None, why there are none that can be used).

    Raises ValueError when --val names them and they cannot be used.
    """
    path = Path(config.input.val) if config.input.val else find_held_out(Path(config.data))
    if path is None or loader.name == "synthetic":
        return None, f"there is no {', '.join(HELD_OUT[:-1])} or {HELD_OUT[-1]} beside the training images"
    held_out, found = _try_held_out(path, config, loader, device)
    if held_out is None and config.input.val:
        raise ValueError(f"--val cannot be used for the k-NN probe: {found}")
    return held_out, found


def _try_held_out(path: Path, config: Config, loader: Loader, device: torch.device) -> tuple[Loader | None, str]:
    shared = {"workers": config.input.workers, "on_bad_image": config.input.on_bad_image, "device": device}
    try:
        held_out = make_loader("auto", path, batch_size=1, seed=0, class_names=loader.class_names, **shared)
    except ValueError as error:
        return None, str(error)
    if not held_out.class_names:
        return None, f"{path} has no class folders" if path.is_dir() else f"{path} has no labels"
    if next(keep_labelled(held_out.eval_batches(_BATCH, limit=config.eval.knn_images)), None) is None:
        what = "has a class" if held_out.decoded else "can be read"
        return None, f"no image that the probe would take from {path} {what}"
    return held_out, "; ".join([str(path), *held_out.notices])


def keep_labelled(batches: Iterable[ImageBatch]) -> Iterator[ImageBatch]:
    """Only the images that have a class: a .beton file or shards may hold some without."""
    for batch in batches:
        rows = (batch.label >= 0).nonzero()[:, 0]
        if len(rows):
            yield batch.select(rows)


def keep_asked(batches: Iterable[ImageBatch], asked: bool) -> Iterator[ImageBatch]:
    """The images that are queries (asked) or the bank (not): a hash of their index chooses one in ASKED_OF_TRAIN."""
    for batch in batches:
        chosen = random_bits(0, 0, batch.index, STREAM_HELD_OUT, 1)[:, 0] % ASKED_OF_TRAIN == 0
        rows = (chosen == asked).nonzero()[:, 0]
        if len(rows):
            yield batch.select(rows)


def knn_percent(
    backbone: nn.Module, bank: Iterable[ImageBatch], queries: Iterable[ImageBatch], config: Config, ranks: Ranks
) -> float:
    """Percentage of all ranks' queries that their --knn-k nearest images in all ranks' bank classify correctly.

    NaN if a feature is not finite, as when the running statistics have run away: the loss does not depend on them.
    """
    dtype = compute_dtype(config.train.precision, ranks.device)

    def features_of(batches: Iterable[ImageBatch]) -> tuple[Tensor, Tensor]:
        features, labels = extract_features(
            backbone,
            batches,
            size=config.augment.image_size,
            resize=eval_resize(config),
            device=ranks.device,
            dtype=dtype,
        )
        return to_rep_space(features, "norm"), labels

    parts = [features_of(bank), features_of(queries)]
    finite = all(bool(features.isfinite().all()) for features, _ in parts)
    banks, finite = zip(*gather_objects((len(parts[0][0]), finite), ranks))
    if not all(finite):
        return math.nan
    k = min(config.eval.knn_k, sum(banks))
    return knn_over_ranks(*parts[0], *parts[1], [k], ranks, Memory(None, ranks.device)).majority[k]


def eval_resize(config: Config) -> int:
    """Short side before the centre crop: 256/224 of the crop, or with the CIFAR stem the crop itself, in pixels."""
    if config.eval.eval_resize is not None:
        return config.eval.eval_resize
    size = config.augment.image_size
    return size if config.model.stem == "cifar" else round(size * 256 / 224)
