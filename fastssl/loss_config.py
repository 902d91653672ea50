"""The terms of the training loss and their weights. Does not import torch: every command line is parsed with it."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LossConfig:
    """The terms of the loss and their weights; a term of weight 0 is not computed.

    The defaults are the "3 align + uniform (t = 3)" of arXiv 2005.10242.
    """

    contrast_weight: float = 0.0  # Weight of InfoNCE against the queue; for plain MoCo 1, with the other weights 0.
    temperature: float = 0.07  # Temperature of the contrastive softmax.
    align_weight: float = 3.0  # Weight of the term that pulls the two views of an image together.
    align_alpha: float = 2.0  # Power of the distance in the alignment term.
    uniform_weight: float = 1.0  # Weight of the term that spreads the queries away from the queue.
    uniform_t: float = 3.0  # Sharpness t of the Gaussian kernel exp(-t d^2) in the uniformity term.
    intra_batch: bool = True  # The uniformity term also counts the pairs inside the batch.

    def __post_init__(self) -> None:
        """Raises ValueError, naming the field, for values that make no sense."""
        for name in ("contrast_weight", "align_weight", "uniform_weight"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be a finite number >= 0, got {getattr(self, name)}")
        if self.contrast_weight == self.align_weight == self.uniform_weight == 0:
            raise ValueError("contrast_weight, align_weight and uniform_weight are all 0: give one a positive weight")
        for name in ("temperature", "align_alpha"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be a finite number > 0, got {getattr(self, name)}")
        if not 0 < self.uniform_t <= 20:
            raise ValueError(f"uniform_t must be in (0, 20], or exp(-4t) is 0 in float32, got {self.uniform_t}")
