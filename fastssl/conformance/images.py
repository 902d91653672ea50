"""Checks of which images a loader gives, in which order, and with which pixels.

Each check raises AssertionError with a sentence, or returns what it saw. Pixels are compared with Pillow's, which come
from libjpeg-turbo with its accurate IDCT. Other versions of libjpeg-turbo differ only in chroma upsampling; nvJPEG has
an IDCT and an upsampling of its own.
"""

from __future__ import annotations

import numpy as np
import torch

from fastssl.conformance.case import Case, contents, reference_pixels, take
from fastssl.plural import counted

MOST_GREY_LEVELS = {"cpu": 4, "cuda": 64}  # largest difference of any value; for CUDA an untested guess
MEAN_GREY_LEVELS = {"cpu": 0.05, "cuda": 1.0}  # mean difference of an image


def check_shares(case: Case, world_size: int) -> str:
    """Ranks get disjoint images, together all but the dropped tail, in the same number of steps."""
    loaders = [case.open(rank, world_size) for rank in range(world_size)]
    steps = {loader.batches_per_epoch for loader in loaders}
    assert len(steps) == 1, f"ranks make different numbers of steps: {sorted(steps)}"
    num_images, whole = loaders[0].num_images, steps.pop()
    steps = min(whole, case.steps)
    seen = [[batch.index.tolist() for batch in take(loader, steps)] for loader in loaders]
    assert all(len(batch) == case.batch_size // world_size for rank in seen for batch in rank), "a batch is not full"
    indices = [i for rank in seen for batch in rank for i in batch]
    assert len(set(indices)) == len(indices), "an image came twice in an epoch"
    assert set(indices) <= set(range(num_images)), "an index lies outside the data set"
    if steps < whole:
        return f"{steps} of {whole} steps, {len(indices)} of {num_images} images, none twice"
    tail = num_images - len(indices)
    assert tail < case.batch_size, f"{tail} images were dropped, enough for a global batch of {case.batch_size}"
    return f"{steps} steps on every rank, {num_images} images, {tail} dropped at the end"


def check_order(case: Case, world_size: int) -> str:
    """The order depends only on (seed, epoch), not on the numbers of ranks and workers or on what was read before."""
    loaders = [case.open(rank, world_size, workers=1 + rank % 3) for rank in range(world_size)]
    steps, num_images = loaders[0].batches_per_epoch, loaders[0].num_images
    for first, count in {0: min(steps, case.steps) + 2, max(0, steps - 1): 3}.items():
        for rank, loader in enumerate(loaders):
            seen = [batch.index.tolist() for batch in take(loader, count, first)]
            assert seen == case.expected(world_size, rank, num_images, first, count), f"rank {rank} has another order"
    other = [batch.index.tolist() for batch in take(case.open(seed=6), 1)]
    assert other != case.expected(1, 0, num_images, 0, 1), "another seed gives the same order"
    return "as in order.py, also across the end of an epoch"


def check_resume(case: Case, world_size: int) -> str:
    """Starting at any batch gives, byte for byte, what the uninterrupted iterator gives from there."""
    loader = case.open(world_size - 1, world_size)
    steps = min(loader.batches_per_epoch, case.steps)
    whole = [contents(batch) for batch in take(loader, steps + 3)]
    starts = sorted({1, steps // 2, steps - 1, steps, steps + 1})
    for first in starts:
        seen = [contents(batch) for batch in take(loader, 2, first)]
        assert seen == whole[first : first + 2], f"starting at batch {first} gives other images"
    return f"started at batches {', '.join(map(str, starts))}"


def check_pixels(case: Case) -> str:
    """Every image has the pixels of its file, within the decoder's bounds."""
    loader = case.open(batch_size=1)
    reference = reference_pixels(case.data)
    worst, mean, count, kind = 0, 0.0, 0, torch.device(case.device).type
    for batch in loader.eval_batches(case.batch_size, limit=case.batch_size * case.steps):
        for n, i in enumerate(batch.index.tolist()):
            found = batch.image(n).cpu().numpy()
            truth = found if reference is None else reference(i)
            assert found.shape == truth.shape, f"image {i} has shape {found.shape}, not {truth.shape}"
            difference = np.abs(found.astype(np.int16) - truth)
            worst, mean, count = max(worst, int(difference.max())), max(mean, float(difference.mean())), count + 1
            assert difference.max() <= MOST_GREY_LEVELS[kind], f"image {i} differs by {difference.max()} grey levels"
            assert difference.mean() <= MEAN_GREY_LEVELS[kind], (
                f"image {i} differs by {difference.mean():.2f} on average"
            )
    assert count, "no image was given out"
    images = counted(count, "image")
    if reference is None:
        return f"{images}, drawn by the loader"
    return f"{images}, at most {worst} grey levels off, {mean:.3f} on average in the worst image"
