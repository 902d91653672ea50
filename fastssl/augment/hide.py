"""Hide-and-seek (Singh and Lee, ICCV 2017) on whole batches: cells of a grid set to zero after normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.augment.params import HIDE_GRIDS
from fastssl.random_key import philox


def hide_cells(x: Tensor, grid: Tensor, probability: Tensor, key: Tensor) -> Tensor:
    """x (C, 3, S, S) with each cell of `grid` (C,) int32 pixels set to 0 with `probability` (C,); grid 0: unchanged.

    Cell (row, column) is hidden where the first word of philox((row, column, key, 0), 0), top 24 bits as a uniform,
    lies below the probability.
    """
    if x.device.type == "cpu" and not grid.any():
        return x
    size = x.shape[2]
    cell = torch.arange(-(-size // min(HIDE_GRIDS)), device=x.device)
    zero = torch.zeros((1, 1, 1), dtype=torch.int64, device=x.device)
    word = philox((cell[None, :, None] + zero, cell[None, None, :] + zero, key[:, None, None], zero), 0)[0]
    shown = ((word >> 8) * 2.0**-24 >= probability[:, None, None]) | (grid == 0)[:, None, None]
    at = torch.arange(size, device=x.device) // grid.clamp(min=1)[:, None]  # (C, S), the cell of each row and column
    at = at.clamp(max=cell.shape[0] - 1)  # only where grid is 0, and there all cells are shown
    image = torch.arange(x.shape[0], device=x.device)[:, None, None]
    return x * shown[image, at[:, :, None], at[:, None, :]][:, None]
