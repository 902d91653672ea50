"""The one contract between loaders and augmentation: a batch is a set of windows into bytes.

Every loader yields `ImageBatch`; `fastssl.augment` turns it into two views. Nothing is cropped, resized or padded
before that, so each image is decoded once and travels as uint8 at its own size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class ImageBatch(NamedTuple):
    """B images of any size; all tensors are on one device, the training device when a loader yields the batch.

    `pixels[offset[i] : offset[i] + height[i] * width[i] * 3]` is image i in H x W x 3 (RGB) order. The windows may
    overlap or leave gaps: `pixels` may be a whole data set.
    """

    pixels: Tensor  # (P,) uint8
    offset: Tensor  # (B,) int64, where each image begins in pixels
    height: Tensor  # (B,) int32, rows
    width: Tensor  # (B,) int32, columns
    index: Tensor  # (B,) int64, the sample's number in the data set; augmentation is seeded with it
    label: Tensor  # (B,) int64, class id; -1 where the data set has no classes
    max_side: int  # no height or width is larger; a host int, so that sizing a kernel launch needs no sync

    @property
    def size(self) -> int:
        """The number of images B. (`len()` of a NamedTuple is its number of fields.)"""
        return self.offset.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ImageBatch:
        """The same batch on another device."""
        return self.apply(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def apply(self, function: Callable[[Tensor], Tensor]) -> ImageBatch:
        """The batch with `function` applied to every tensor."""
        return ImageBatch(*(function(tensor) for tensor in self[:-1]), self.max_side)

    def select(self, rows: Tensor | slice) -> ImageBatch:
        """Some of the images, chosen by an index, a mask or a slice: windows into the same bytes."""
        return ImageBatch(self.pixels, *(tensor[rows] for tensor in self[1:-1]), self.max_side)

    def image(self, i: int) -> Tensor:
        """Image i as an (H, W, 3) uint8 view. Syncs with the host, so not for use inside a training step."""
        start, height, width = int(self.offset[i]), int(self.height[i]), int(self.width[i])
        return self.pixels[start : start + height * width * 3].view(height, width, 3)


def pack_images(images: Sequence[np.ndarray], index: Sequence[int], label: Sequence[int]) -> ImageBatch:
    """Packs (H, W, 3) uint8 arrays of any sizes into one CPU batch, back to back in the given order.

    Raises ValueError when an array is not (H, W, 3) uint8 or is empty, and unless each has an index and a label.
    """
    if not len(images) == len(index) == len(label):
        raise ValueError(f"{len(images)} images need an index and a label each, got {len(index)} and {len(label)}")
    for i, image in zip(index, images):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise ValueError(f"image {i} must be (H, W, 3) uint8 with H, W >= 1, got {image.shape} {image.dtype}")
    sizes = np.array([image.size for image in images], dtype=np.int64)
    offset = np.concatenate([[0], np.cumsum(sizes)])
    pixels = np.empty(offset[-1], dtype=np.uint8)
    for start, image in zip(offset, images):
        pixels[start : start + image.size] = image.reshape(-1)
    return ImageBatch(
        pixels=torch.from_numpy(pixels),
        offset=torch.from_numpy(offset[:-1].astype(np.int64)),
        height=torch.tensor([image.shape[0] for image in images], dtype=torch.int32),
        width=torch.tensor([image.shape[1] for image in images], dtype=torch.int32),
        index=torch.tensor(list(index), dtype=torch.int64),
        label=torch.tensor(list(label), dtype=torch.int64),
        max_side=max((max(image.shape[:2]) for image in images), default=1),
    )


def split_batch(batch: ImageBatch, parts: int) -> list[ImageBatch]:
    """Splits a batch into `parts` batches of consecutive images; its size must be a multiple of `parts`."""
    size = batch.size // parts
    return [batch.select(slice(i * size, (i + 1) * size)) for i in range(parts)]
