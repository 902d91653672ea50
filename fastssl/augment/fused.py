"""The augmentation on a GPU, by the Triton kernels."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fastssl.augment.jitter import jitter_code
from fastssl.augment.normalise import MEAN, STD
from fastssl.augment.params import ViewParams, sample_both
from fastssl.augment.policy import Policy
from fastssl.batch import ImageBatch

MAX_BATCH = 32_767  # a launch has two views per image along its second axis, whose limit is 65,535


def draw_views_fused(
    batch: ImageBatch,
    policy: Policy,
    seed: int,
    epoch: int,
    size: int,
    dtype: torch.dtype,
    key_bytes: bool = False,
) -> tuple[Tensor, Tensor]:
    """Both views in three launches, the first of which draws their parameters; each (B, 3, size, size), channels_last.

    key_bytes: view_k is uint8, neither normalised nor hidden. With the policy's `crop_iou` the parameters are drawn
    by PyTorch, in about a hundred small operations before the launches.
    Raises ValueError for more than MAX_BATCH images.
    """
    if policy.crop_iou is not None:
        return make_views_fused(batch, sample_both(policy, batch, seed, epoch), size, dtype, key_bytes)
    return _launch(batch, None, (policy, seed, epoch), size, dtype, key_bytes)


def make_views_fused(
    batch: ImageBatch,
    params: tuple[ViewParams, ViewParams],
    size: int,
    dtype: torch.dtype,
    key_bytes: bool = False,
) -> tuple[Tensor, Tensor]:
    """`make_view` for both views at once, in three launches; each (B, 3, size, size), channels_last.

    Raises ValueError for more than MAX_BATCH images.
    """
    both = ViewParams(*(torch.cat(fields) for fields in zip(*params)))
    return _launch(batch, make_tables(both), None, size, dtype, key_bytes)


def _launch(
    batch: ImageBatch,
    tables: tuple[Tensor, Tensor] | None,
    key: tuple[Policy, int, int] | None,
    size: int,
    dtype: torch.dtype,
    key_bytes: bool,
) -> tuple[Tensor, Tensor]:
    """The views with the parameters in `tables`, or with parameters that the first launch draws from `key`."""
    from fastssl.kernels.views import Draw, Tables, Windows, empty_tables, views_triton  # Triton may be missing

    if batch.size > MAX_BATCH:
        most = f"the triton augmentation kernel takes at most {MAX_BATCH:,} images"
        raise ValueError(f"{most}, got {batch.size:,}: set --accumulate or a smaller --batch-size")
    fields = batch.pixels, batch.offset, batch.height, batch.width, batch.index.long()
    windows = Windows(*(field.contiguous() for field in fields))  # `select` may have chosen every second image
    draw = None
    if key is not None:
        policy, seed, epoch = key
        draw = Draw(policy_table(policy, batch.pixels.device), (seed + 2**63) % 2**64 - 2**63, epoch)
    rows = Tables(*tables) if tables is not None else empty_tables(windows)
    view_q, view_k = views_triton(windows, rows, draw, size, MEAN, STD, dtype, key_bytes)
    return view_q.permute(0, 3, 1, 2), view_k.permute(0, 3, 1, 2)


@lru_cache(maxsize=32)
def policy_table(policy: Policy, device: torch.device) -> Tensor:
    """The policy's numbers as `kernels/views_draw.py` needs them, (POLICY_FIELDS,) float64; cached on the device."""
    from fastssl.kernels.views_table import POLICY_FIELDS

    low, high = policy.crop_ratio
    derived = {"central": policy.crop_scale is None, "ratio_low": low, "ratio_high": high, "ratio_low_inverse": 1 / low}
    for name, (start, span) in policy.ranges().items():
        derived |= {f"{name}_low": start, f"{name}_span": span}
    values = [float(derived[name] if name in derived else getattr(policy, name)) for name in POLICY_FIELDS]
    return torch.tensor(values, dtype=torch.float64, device=device)


def make_tables(params: ViewParams) -> tuple[Tensor, Tensor]:
    """The tables of `kernels/views_table.py` for N views: (N, INTS) int32 and (N, FLOATS) float32."""
    from fastssl.kernels.views_table import FLOAT_FIELDS, INT_FIELDS

    plan, hue_levels = jitter_code(params)
    place = torch.arange(4, device=plan.device)
    is_contrast = (plan[:, None] >> (3 * place)) & 7 == 1
    derived = {
        "plan": plan,
        "contrast_at": torch.where(is_contrast, place, 4).amin(dim=1),
        "hue_levels": hue_levels,
    }
    ints = [(derived[name] if name in derived else getattr(params, name)).int() for name in INT_FIELDS]
    return torch.stack(ints, dim=1), torch.stack([getattr(params, name) for name in FLOAT_FIELDS], dim=1)
