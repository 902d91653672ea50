"""Images that need no files: rendered once from (seed, index); batches are windows into them on the device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastssl.batch import ImageBatch
from fastssl.loaders.order import FULL, Order, count_batches, eval_shares, train_shares
from fastssl.random_key import STREAM_SYNTHETIC, random_bits

_GRID = 8  # colours per side of an image, interpolated in between
_NUM_CLASSES = 10


class SyntheticLoader:
    """Loader of `num_images` smooth random pictures of `size` x `size`; the contract is `make.Loader`.

    Batches are windows into one buffer of num_images * size * size * 3 bytes on the device: nothing is copied or
    decoded. Raises ValueError when there are fewer images than one global batch.
    """

    def __init__(
        self,
        num_images: int,
        size: int,
        device: torch.device | str,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        order: Order = FULL,
    ) -> None:
        if size < 1:
            raise ValueError(f"synthetic images must be at least 1 pixel wide and high, got {size}")
        self.num_images, self.size = num_images, size
        self.class_names = [str(label) for label in range(min(_NUM_CLASSES, num_images))]
        self.batches_per_epoch = count_batches(num_images, batch_size, world_size)
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.order = order
        self.bad_images, self.notices = list[str](), list[str]()
        self.decoded = 0
        self.device = torch.device(device)
        self._pixels = render_images(num_images, size, seed, self.device).reshape(-1)

    def batches(self, first: int = 0) -> Iterator[ImageBatch]:
        """Batches first, first + 1, ... of this rank, of `batch_size` images each, without end."""
        shares = train_shares(
            self.num_images, self.batch_size, self.seed, self.rank, self.world_size, first, self.device, self.order
        )
        return (self._windows(share) for share in shares)

    def eval_batches(
        self, batch_size: int, rank: int = 0, world_size: int = 1, limit: int | None = None
    ) -> Iterator[ImageBatch]:
        """This rank's contiguous part of all images, or of `limit` evenly spread ones, in file order."""
        shares = eval_shares(self.num_images, batch_size, rank, world_size, limit)
        return (self._windows(share.to(self.device)) for share in shares)

    def close(self) -> None:
        """Does nothing: there are no threads."""

    def _windows(self, index: Tensor) -> ImageBatch:
        side = torch.full_like(index, self.size, dtype=torch.int32)
        offset = index * (self.size * self.size * 3)
        return ImageBatch(self._pixels, offset, side, side, index, index % _NUM_CLASSES, self.size)


def render_images(num_images: int, size: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """(num_images, size, size, 3) uint8: image i is 8 x 8 random colours, blended bilinearly, from (seed, i)."""
    blend = _blend_weights(size).to(device)  # (S, G)
    images = torch.empty(num_images, size, size, 3, dtype=torch.uint8, device=device)
    for part in torch.arange(num_images, device=device).split(64):
        bits = random_bits(seed, 0, part, STREAM_SYNTHETIC, _GRID * _GRID * 3)
        colours = (bits >> 24).to(torch.float64).view(-1, _GRID, _GRID, 3)
        # whole numbers, whose sums are exact in any order, so the bytes are the same on every device
        images[part] = (torch.einsum("yg,bghc,xh->byxc", blend, colours, blend) / 65536.0).to(torch.uint8)
    return images


def _blend_weights(size: int) -> Tensor:
    """(size, _GRID) float64 whole numbers: each row has the weights of two neighbouring colours, which sum to 256."""
    position = torch.arange(size) * ((_GRID - 1) * 256) // max(size - 1, 1)
    left = (position // 256).clamp(max=_GRID - 2)
    right_weight = position - left * 256
    weights = torch.zeros(size, _GRID, dtype=torch.float64)
    weights.scatter_(1, left[:, None], (256 - right_weight)[:, None].double())
    return weights.scatter_(1, left[:, None] + 1, right_weight[:, None].double())
