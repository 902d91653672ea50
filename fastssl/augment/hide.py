"""Hide-and-seek (Singh and Lee, ICCV 2017) on whole batches: sets random cells of a grid to zero."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.augment.params import MAX_HIDE_CELLS
from fastssl.random_key import philox


def update_hide(x: Tensor, cells: Tensor, probability: Tensor, key: Tensor) -> None:
    """Sets each cell of a grid of `cells` x `cells` (C,) over x (C, 3, S, S) to 0 with `probability` (C,).

    Cell (row, column) is hidden if the first word of philox((row, column, key, 0), 0), its top 24 bits taken as a
    uniform, is below the probability. Pixel y lies in row y * cells // S.
    """
    size = x.shape[2]
    cell = torch.arange(MAX_HIDE_CELLS, device=x.device)
    zero = torch.zeros((1, 1, 1), dtype=torch.int64, device=x.device)
    word = philox((cell[None, :, None] + zero, cell[None, None, :] + zero, key[:, None, None], zero), 0)[0]
    shown = (word >> 8) * 2.0**-24 >= probability[:, None, None]
    at = torch.arange(size, device=x.device) * cells[:, None] // size  # (C, S)
    image = torch.arange(x.shape[0], device=x.device)[:, None, None]
    x.mul_(shown[image, at[:, :, None], at[:, None, :]][:, None])
