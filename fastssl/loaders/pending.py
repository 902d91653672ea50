"""A batch whose images threads are still decoding, and what becomes of the images that they cannot decode."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastssl.batch import ImageBatch
from fastssl.loaders.bad_images import BadImages
from fastssl.loaders.recycle import RecycledBuffers

_CHUNK = 32  # images per task at most, enough to make the cost of handing out tasks negligible


class PendingBatch(NamedTuple):
    """A batch that threads are decoding."""

    index: np.ndarray  # (B,) int64, the images wanted
    record: np.ndarray  # (B,) int64, the images decoded: the same, except for replacements of known bad ones
    height: np.ndarray  # (B,) int32
    width: np.ndarray  # (B,) int32
    offset: np.ndarray  # (B,) int64
    pixels: Tensor  # (P,) uint8
    tasks: list[Future]  # each returns the rows that could not be decoded


def split_rows(rows: int, workers: int) -> list[slice]:
    """Rows 0 ... rows - 1 in tasks: small ones, so that no worker waits long for another one's last task."""
    step = max(1, min(_CHUNK, rows // (2 * workers)))
    return [slice(row, min(row + step, rows)) for row in range(0, rows, step)]


def start_batch(
    index: np.ndarray,
    record: np.ndarray,
    height: np.ndarray,
    width: np.ndarray,
    buffers: RecycledBuffers,
    decode: Callable[[slice, np.ndarray, np.ndarray], list[int]],
    pool: ThreadPoolExecutor,
    workers: int,
) -> PendingBatch:
    """Lays a batch out, back to back, and gives it to the `workers` threads of `pool` in small tasks.

    index, record: (B,) int64; height, width: (B,) int32. decode(rows, pixels, offset) writes the images `rows` into
    `pixels`, each at its `offset`, and returns which of them it could not decode, counted from the first of `rows`.
    """
    end = np.cumsum(height.astype(np.int64) * width * 3)
    offset = np.concatenate([[0], end])[:-1]
    pixels = buffers.take(int(end[-1]) if len(end) else 0)

    def decode_rows(rows: slice) -> list[int]:
        return [rows.start + i for i in decode(rows, pixels.numpy(), offset[rows])]

    tasks = [pool.submit(decode_rows, rows) for rows in split_rows(len(index), workers)]
    return PendingBatch(index, record, height, width, offset, pixels, tasks)


def finish_batch(batch: PendingBatch, images: BadImages, label: np.ndarray, replace: bool) -> ImageBatch:
    """Waits for the threads; replaces, or leaves out, the images that they could not decode. label: of all images."""
    index, record, height, width, offset, pixels = batch[:6]
    bad = [row for task in batch.tasks for row in task.result()]
    if bad and replace:
        record, height, width = record.copy(), height.copy(), width.copy()
        for row in bad:
            image, record[row] = images.load_replacing(int(record[row]))
            height[row], width[row] = image.shape[:2]
            offset[row] = len(pixels)  # the replacement goes behind all others
            pixels = torch.cat([pixels, torch.from_numpy(image.reshape(-1))])
    elif bad:
        index, record, height, width, offset = (np.delete(array, bad) for array in batch[:5])
    tensors = map(torch.from_numpy, (offset, height, width, index, label[record]))
    return ImageBatch(pixels, *tensors, max_side=int(max(height.max(initial=1), width.max(initial=1))))
