"""A whole data set decoded once into device memory. Batches are windows into it, without copies or work on the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from fastssl.batch import ImageBatch
from fastssl.loaders.memory import check_room
from fastssl.loaders.order import batch_share, epoch_order, eval_share
from fastssl.loaders.stream_loader import StreamLoader

_LOAD_BATCH = 64  # images per batch while loading
LOAD_AHEAD = 2  # such batches decoded ahead, on a CPU too, as nothing else needs the cores yet


class ResidentLoader:
    """Loader that holds the images of `source` decoded on the device; the contract is `make.Loader`.

    source: a loader of a folder or a .beton file, of the same batches. data: its name in messages. shard: each rank
    holds only its share, contiguous in file order, and sees no other images. The order within a share is that of the
    whole epoch without the other images, so it is still a function of (seed, epoch). In an evaluation each rank gets
    images of its own share; an evaluation by a single rank sees only that rank's share. Replacements of unreadable
    images come from the same share.
    Raises ValueError before anything is decoded when the images do not fit into the free memory.
    """

    def __init__(self, source: StreamLoader, data: str, shard: bool) -> None:
        self.device, self.seed, self.order = source.decoder.prefetcher.device, source.seed, source.order
        self.batch_size, self.rank, self.world_size = source.batch_size, source.rank, source.world_size
        self.num_images, self.batches_per_epoch = source.num_images, source.batches_per_epoch
        self.class_names, self.notices = source.class_names, source.notices
        self.shard = shard and self.world_size > 1
        part = (self.rank, self.world_size) if self.shard else (0, 1)
        held = eval_share(self.num_images, *part)
        self.start, self.count = int(held[0]), len(held)
        needed = source.decoder.pixel_bytes(range(self.start, self.start + self.count))
        self.held = check_room(needed, self.device, data, can_shard=not self.shard and self.world_size > 1)
        self._load(source, part, needed)
        self.bad_images, self.decoded = source.bad_images, source.decoded

    def batches(self, first: int = 0) -> Iterator[ImageBatch]:
        """Batches first, first + 1, ... of this rank, of `batch_size` images each, without end."""
        first_epoch, first_step = divmod(first, self.batches_per_epoch)
        for epoch in itertools.count(first_epoch):
            order = epoch_order(self.num_images, self.seed, epoch, self.device, self.order)
            part = (self.rank, self.world_size)
            if self.shard:
                order, part = self._held_of(order), (0, 1)
            for step in range(first_step if epoch == first_epoch else 0, self.batches_per_epoch):
                yield self._windows(batch_share(order, step, self.batch_size, *part))

    def eval_batches(
        self, batch_size: int, rank: int = 0, world_size: int = 1, limit: int | None = None
    ) -> Iterator[ImageBatch]:
        """This rank's contiguous part of all images, or of `limit` evenly spread ones, in file order."""
        share = self._eval_share(rank, world_size, limit)
        for part in share.split(batch_size):
            readable = part[self._readable[part - self.start]]
            if len(readable):  # on a GPU a view costs as much as the largest image that its batch may have
                largest = int(self._sides[readable - self.start].max())
                yield self._windows(readable.to(self.device))._replace(max_side=largest)

    def close(self) -> None:
        """Does nothing: there are no threads."""

    def _load(self, source: StreamLoader, part: tuple[int, int], needed: int) -> None:
        """Decodes the images into one buffer, and makes windows of unreadable ones point to the next readable image."""
        self._pixels = torch.empty(needed, dtype=torch.uint8, device=self.device)
        windows = torch.zeros(4, self.count, dtype=torch.int64, device=self.device)  # offset, height, width, label
        readable = torch.zeros(self.count, dtype=torch.bool, device=self.device)
        self._max_side, end = 1, 0
        with tqdm(total=self.count, unit="image", desc="decoding", disable=None if self.rank == 0 else True) as bar:
            for batch in source.eval_batches(_LOAD_BATCH, *part):
                rows, start, end = batch.index - self.start, end, end + len(batch.pixels)
                if end > needed:
                    raise ValueError("the images changed while they were being read: start again")
                self._pixels[start:end] = batch.pixels
                windows[:, rows] = torch.stack([batch.offset + start, batch.height, batch.width, batch.label])
                readable[rows] = True
                self._max_side = max(self._max_side, batch.max_side)
                bar.update(batch.size)
        self._readable = readable.cpu()
        bad, good = (~self._readable).nonzero()[:, 0], self._readable.nonzero()[:, 0]
        if not len(good):
            raise ValueError(f"no image can be decoded ({self.count:,} tried), the first is {source.bad_images[0]}")
        if len(bad):
            replacements = good[torch.searchsorted(good, bad) % len(good)]
            windows[:, bad] = windows[:, replacements.to(self.device)]
        self._offset, self._label = windows[0], windows[3]
        self._height, self._width = windows[1].int(), windows[2].int()
        self._sides = torch.maximum(self._height, self._width).cpu()

    def _held_of(self, index: Tensor) -> Tensor:
        """Those of the images that this rank holds, in their order."""
        return index[(index >= self.start) & (index < self.start + self.count)]

    def _eval_share(self, rank: int, world_size: int, limit: int | None) -> Tensor:
        if not self.shard:
            return eval_share(self.num_images, rank, world_size, limit)
        if world_size == 1:
            return eval_share(self.count, limit=limit) + self.start
        if (rank, world_size) != (self.rank, self.world_size):
            raise ValueError(
                f"rank {self.rank} of {self.world_size} does not hold the images of rank {rank} of {world_size}: "
                "remove --resident-shard"
            )
        return self._held_of(eval_share(self.num_images, limit=limit))

    def _windows(self, index: Tensor) -> ImageBatch:
        rows = index - self.start
        windows = (tensor[rows] for tensor in (self._offset, self._height, self._width))
        return ImageBatch(self._pixels, *windows, index, self._label[rows], self._max_side)
