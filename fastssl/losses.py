"""The training loss of one rank: a weighted mix of contrast, align and uniform, each against the queue.

    total = contrast_weight * contrast + align_weight * align + uniform_weight * uniform

Shapes: N = queries of this rank, K = rows of the queue, D = feature dimension. Rows are unit vectors; the queue is
the one before this step's keys enter it; only q receives a gradient. The published formulas stand in
`kernels/reference.py`, the algebra that reduces them to one pass over the queue in `kernels/README.md`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.kernels.reference import align_reference, contrast_reference, uniform_reference

KERNELS = ("auto", "triton", "reference")


@dataclass(frozen=True)
class LossConfig:
    """Which terms the loss has and how they weigh. The defaults are the 3 align + uniform (t = 3) of arXiv 2005.10242.

    A term of weight 0 is not computed. Raises ValueError naming the field when a value makes no sense.
    """

    contrast_weight: float = 0.0  # InfoNCE against the queue; MoCo is 1 with the other weights 0
    temperature: float = 0.07  # of the contrastive softmax
    align_weight: float = 3.0  # pulls the two views of an image together
    align_alpha: float = 2.0  # power of the distance in align
    uniform_weight: float = 1.0  # spreads the queries away from the queue
    uniform_t: float = 3.0  # sharpness of the Gaussian kernel exp(-t d^2) in uniform
    intra_batch: bool = True  # uniform also counts the pairs inside the batch

    def __post_init__(self) -> None:
        for name in ("contrast_weight", "align_weight", "uniform_weight"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be a finite number >= 0, got {getattr(self, name)}")
        if self.contrast_weight == self.align_weight == self.uniform_weight == 0:
            raise ValueError("contrast_weight, align_weight and uniform_weight are all 0: give one a positive weight")
        for name in ("temperature", "align_alpha"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be a finite number > 0, got {getattr(self, name)}")
        if not 0 < self.uniform_t <= 20:
            raise ValueError(f"uniform_t must be in (0, 20] (beyond, exp(-4t) is 0 in float32), got {self.uniform_t}")


class MoCoLoss(NamedTuple):
    """The loss and its parts, 0-dim tensors on the device; a part that was not computed (weight 0) is None."""

    total: Tensor  # the weighted mix, to call backward on
    contrast: Tensor | None
    align: Tensor | None
    uniform: Tensor | None
    top1: Tensor | None  # percent of queries whose key is nearer than every queue row, comes with contrast
    top5: Tensor | None  # percent of queries with fewer than 5 queue rows nearer than their key


def moco_loss(q: Tensor, k: Tensor, queue: Tensor, config: LossConfig, kernel: str = "auto") -> MoCoLoss:
    """The loss of N queries against their keys and the queue.

    q, k: (N, D) unit rows, the gradient flows to q only; queue: (K, D) unit rows, read in place and not needed by the
    backward, so it may be overwritten as soon as this returns. Low-precision q and k are widened to float32, under
    autocast too. kernel: "auto" takes what `choose_kernel` says.

    Raises ValueError when shapes, devices or layouts do not fit (no host sync; `check_loss_inputs` looks at values).
    """
    check_shapes(q, k, queue)
    choose_kernel(q.device, queue.dtype, q.shape[1], kernel)
    with torch.autocast(q.device.type, enabled=False):
        q, k, queue = _widen(q), _widen(k.detach()), queue.detach()
        # autograd of the plain formula keeps the queue for the backward, so it keeps a copy
        return _mix_terms(_reference_terms(q, k, queue.to(q.dtype, copy=True), config), config)


def choose_kernel(device: torch.device, dtype: torch.dtype, dim: int, requested: str = "auto") -> tuple[str, str]:
    """The implementation a loss on this device runs with, and why in a few words.

    dtype: the queue's; dim: the feature dimension D. Raises ValueError when the one requested cannot run.
    """
    if requested not in KERNELS:
        raise ValueError(f"unknown loss kernel {requested!r}: choose one of {', '.join(KERNELS)}")
    return "reference", "the only one yet"


def check_shapes(q: Tensor, k: Tensor, queue: Tensor) -> None:
    """Raises ValueError, with the shapes and the mend, when the loss cannot take these tensors. Reads no values."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, queue {tuple(queue.shape)}"
    if q.dim() != 2 or k.shape != q.shape:
        raise ValueError(f"q and k must both be (N, D), one row per image, got {shapes}")
    if queue.dim() != 2 or queue.shape[1] != q.shape[1]:
        raise ValueError(f"the queue must be (K, D), one key per row, with the D of q, got {shapes}")
    if 0 in q.shape or queue.shape[0] == 0:
        raise ValueError(f"the loss needs at least one query and one row in the queue, got {shapes}")
    for name, tensor in (("q", q), ("k", k), ("queue", queue)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {tensor.dtype}: convert it with .float()")
        if tensor.device != q.device:
            raise ValueError(f"q is on {q.device} but {name} on {tensor.device}: move both to one device ({shapes})")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous: store its rows one after another, .contiguous() ({shapes})")


def check_loss_inputs(q: Tensor, k: Tensor, queue: Tensor) -> None:
    """Raises ValueError when shapes do not fit or rows are not unit vectors, which every kernel relies on.

    Reads values on the host: for the first step and for debugging, not for every step.
    """
    check_shapes(q, k, queue)
    for name, tensor in (("q", q), ("k", k), ("queue", queue)):
        # rounding D elements moves a norm by at most half a unit in the last place; 4 leave room for the normalise
        tolerance = max(4 * torch.finfo(tensor.dtype).eps, 1e-4)
        norm = torch.linalg.vector_norm(tensor.detach(), dim=1, dtype=torch.promote_types(tensor.dtype, torch.float32))
        bad = (~((norm - 1).abs() <= tolerance)).nonzero()  # "not <=" so that NaN counts as bad
        if len(bad):
            row = int(bad[0])
            raise ValueError(
                f"{len(bad)} of {len(norm)} rows of {name} {tuple(tensor.shape)} are not unit vectors (row {row} has "
                f"norm {norm[row]:.4g}): pass it through torch.nn.functional.normalize(..., dim=1) in float32"
            )


def _widen(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _reference_terms(q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor, config: LossConfig) -> dict[str, Tensor]:
    terms = {}
    if config.contrast_weight:
        terms["contrast"], above_N = contrast_reference(q_ND, k_ND, queue_KD, config.temperature)
        terms |= _accuracy(above_N)
    if config.align_weight:
        terms["align"] = align_reference(q_ND, k_ND, config.align_alpha)
    if config.uniform_weight:
        terms["uniform"] = uniform_reference(q_ND, queue_KD, config.uniform_t, config.intra_batch)
    return terms


def _accuracy(above_N: Tensor) -> dict[str, Tensor]:
    """Percent of queries whose key is among the nearest 1 and 5, from how many queue rows are nearer than the key."""
    return {"top1": 100 * (above_N < 1).float().mean(), "top5": 100 * (above_N < 5).float().mean()}


def _mix_terms(terms: dict[str, Tensor], config: LossConfig) -> MoCoLoss:
    names = [name for name in ("contrast", "align", "uniform") if name in terms]
    total = sum(getattr(config, f"{name}_weight") * terms[name] for name in names)
    return MoCoLoss(total, *(terms.get(name) for name in MoCoLoss._fields[1:]))
