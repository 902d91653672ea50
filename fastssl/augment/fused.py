"""The Triton kernels as an implementation of the views, and which implementation a device gets."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.augment.jitter import jitter_order, jitter_plan
from fastssl.augment.params import ViewParams
from fastssl.batch import ImageBatch
from fastssl.triton_device import triton_obstacle

AUGMENT_KERNELS = ("auto", "triton", "reference")
MAX_BATCH = 32_767  # two views an image along the second axis of a launch, which ends at 65,535


def choose_augment_kernel(device: torch.device, requested: str = "auto") -> tuple[str, str]:
    """Which implementation makes the views on this device, "triton" or "reference", and why in a few words.

    Raises ValueError when the one requested cannot run.
    """
    if requested not in AUGMENT_KERNELS:
        raise ValueError(f"unknown augmentation kernel {requested!r}: choose one of {', '.join(AUGMENT_KERNELS)}")
    if requested == "reference":
        return requested, "requested"
    if requested == "auto" and device.type == "cpu":  # where Triton may run too, interpreted, for tests
        return "reference", "no CUDA device"
    obstacle = triton_obstacle(device)
    if requested == "auto":
        return ("triton", "a CUDA device") if obstacle is None else ("reference", obstacle)
    if obstacle is not None:
        raise ValueError(f"the triton augmentation kernel cannot run ({obstacle}): take --augment-kernel auto")
    return requested, "requested"


def make_views_fused(
    batch: ImageBatch,
    params: tuple[ViewParams, ViewParams],
    size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`make_view` for both views at once, in three launches; each (B, 3, size, size), channels_last.

    Raises ValueError for more than MAX_BATCH images.
    """
    from fastssl.kernels.views import views_triton  # Triton is not installed everywhere

    if batch.size > MAX_BATCH:
        raise ValueError(f"the triton augmentation kernel takes at most {MAX_BATCH} images, got {batch.size}")
    both = ViewParams(*(torch.cat(fields) for fields in zip(*params)))
    ints, floats = make_tables(both)
    out = views_triton(batch.pixels, batch.offset, batch.width, ints, floats, size, mean, std, dtype)
    out = out.permute(0, 3, 1, 2)
    return out[: batch.size], out[batch.size :]


def make_tables(params: ViewParams) -> tuple[Tensor, Tensor]:
    """The tables of `kernels/views_table.py` for N views: (N, INTS) int32 and (N, FLOATS) float32."""
    from fastssl.kernels.views_table import FLOAT_FIELDS, INT_FIELDS

    wanted = jitter_plan(params).any(dim=2)  # (N, 4): is anything done at this position?
    order = torch.where(wanted, jitter_order(params.order), 7)
    place = torch.arange(4, device=order.device)
    derived = {
        "plan": (order << (3 * place)).sum(dim=1),
        "contrast_at": torch.where(order == 1, place, 4).amin(dim=1),
        "hue_levels": (params.hue * 255).trunc(),  # torchvision's int(turns * 255)
    }
    ints = [(derived[name] if name in derived else getattr(params, name)).int() for name in INT_FIELDS]
    return torch.stack(ints, dim=1), torch.stack([getattr(params, name) for name in FLOAT_FIELDS], dim=1)
