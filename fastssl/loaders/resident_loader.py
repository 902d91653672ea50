"""A whole data set decoded once into device memory. Batches are windows into it, without copies or work on the CPU."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import closing

import torch
from torch import Tensor
from tqdm import tqdm

from fastssl.batch import ImageBatch
from fastssl.loaders.folder_loader import FolderLoader
from fastssl.loaders.memory import check_room
from fastssl.loaders.order import FULL, Order, count_batches, epoch_order, eval_share

_LOAD_BATCH = 64  # images per batch while loading
_READ_AHEAD = 2  # such batches decoded ahead, on a CPU too, as nothing else needs the cores yet


class ResidentLoader:
    """Loader that holds a .beton file or an image folder decoded on the device; the contract is `make.Loader`.

    shard: each rank holds only its share, contiguous in file order, and sees no other images. The order within a share
    is that of the whole epoch without the other images, so it is still a function of (seed, epoch). In an evaluation
    each rank gets images of its own share; an evaluation by a single rank sees only that rank's share.
    on_bad_image: as in `FolderLoader`, but replacements come from the same share.
    Raises ValueError before anything is decoded when the images do not fit into the free memory.
    """

    def __init__(
        self,
        data: str | os.PathLike,
        *,
        batch_size: int,
        seed: int,
        device: torch.device | str,
        rank: int = 0,
        world_size: int = 1,
        order: Order = FULL,
        workers: int | None = None,
        on_bad_image: str = "skip",
        class_names: Sequence[str] | None = None,
        cache: str = "page",
        shard: bool = False,
    ) -> None:
        self.device, self.order = torch.device(device), order
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.shard = shard and world_size > 1
        options = {"workers": workers, "on_bad_image": on_bad_image, "class_names": class_names, "device": device}
        options["read_ahead"] = _READ_AHEAD
        with closing(_open_source(data, cache, options)) as source:
            self.num_images, self.class_names, self.notices = source.num_images, source.class_names, source.notices
            self.batches_per_epoch = count_batches(self.num_images, batch_size, world_size)
            part = (rank, world_size) if self.shard else (0, 1)
            held = eval_share(self.num_images, *part)
            self.start, self.count = int(held[0]), len(held)
            needed = source.pixel_bytes(range(self.start, self.start + self.count))
            self.held = check_room(needed, self.device, os.fspath(data), can_shard=not self.shard and world_size > 1)
            self._load(source, part, needed)
            self.bad_images, self.decoded = source.bad_images, source.decoded

    def batches(self, first: int = 0) -> Iterator[ImageBatch]:
        """Batches first, first + 1, ... of this rank, of `batch_size` images each, without end."""
        first_epoch, first_step = divmod(first, self.batches_per_epoch)
        for epoch in itertools.count(first_epoch):
            share = self._epoch_share(epoch)
            for step in range(first_step if epoch == first_epoch else 0, self.batches_per_epoch):
                yield self._windows(share[step * self.batch_size : (step + 1) * self.batch_size])

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

    def _load(self, source: FolderLoader, part: tuple[int, int], needed: int) -> None:
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

    def _epoch_share(self, epoch: int) -> Tensor:
        """This rank's images of an epoch in order, (n,) int64; with shards n may exceed what the batches need."""
        order = epoch_order(self.num_images, self.seed, epoch, self.device, self.order)
        if self.shard:
            return order[(order >= self.start) & (order < self.start + self.count)]
        steps = order[: self.batches_per_epoch * self.batch_size * self.world_size]
        return steps.view(-1, self.world_size, self.batch_size)[:, self.rank].reshape(-1)

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
        chosen = eval_share(self.num_images, limit=limit)
        return chosen[(chosen >= self.start) & (chosen < self.start + self.count)]

    def _windows(self, index: Tensor) -> ImageBatch:
        rows = index - self.start
        windows = (tensor[rows] for tensor in (self._offset, self._height, self._width))
        return ImageBatch(self._pixels, *windows, index, self._label[rows], self._max_side)


def _open_source(data: str | os.PathLike, cache: str, options: dict[str, object]) -> FolderLoader:
    """The loader that decodes the images once."""
    if os.path.isdir(data):
        return FolderLoader(data, batch_size=1, seed=0, **options)
    from fastssl.loaders.beton_loader import BetonLoader  # needs libturbojpeg, which a folder does not

    return BetonLoader(data, batch_size=1, seed=0, cache=cache, **options)
