"""Checks the inputs of the loss, and chooses the implementation that computes it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from fastssl.kernels.row_checks import check_rows
from fastssl.kernels.row_lse_blocks import DIMS
from fastssl.kernels.row_lse_tiled import MAX_SCALE
from fastssl.machine.triton_device import triton_obstacle

KERNELS = ("auto", "triton", "tiled", "reference")


def choose_kernel(
    device: torch.device,
    dtype: torch.dtype,
    dim: int,
    requested: str = "auto",
    temperature: float | None = None,
) -> tuple[str, str]:
    """(name of the loss kernel for this device, why in a few words).

    dtype: the queue's; dim: the feature dimension D; temperature: the contrastive term's, None without that term.
    Every kernel but "reference" needs exp(1 / temperature) to fit into float32. Raises ValueError when the requested
    kernel cannot run.
    """
    if requested not in KERNELS:
        raise ValueError(f"unknown loss kernel {requested!r}: choose one of {', '.join(KERNELS)}")
    if requested == "reference":
        return requested, "requested"
    if temperature is not None and temperature < 1 / MAX_SCALE:
        reason = f"temperature {temperature:g} is below 1/{MAX_SCALE:g}"
        if requested != "auto":
            raise ValueError(f"the {requested} loss kernel cannot run ({reason}): use --loss-kernel auto")
        return "reference", reason
    if requested == "tiled":
        return requested, "requested"
    if requested == "auto" and device.type == "cpu":  # for tests, Triton's interpreter could run here too
        return "tiled", "no CUDA device"
    obstacle = _obstacle(device, dtype, dim)
    if requested == "auto":
        return ("triton", f"runs on {device.type} with D = {dim}") if obstacle is None else ("tiled", obstacle)
    if obstacle is not None:
        raise ValueError(f"the triton loss kernel cannot run ({obstacle}): use --loss-kernel auto")
    return requested, "requested"


def _obstacle(device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
    """Why the Triton kernel cannot run, or None."""
    obstacle = triton_obstacle(device)
    if obstacle is not None:
        return obstacle
    if dim not in DIMS:
        return f"D = {dim} is not one of {', '.join(map(str, DIMS))}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"no kernel for {dtype}"
    return None


def check_shapes(q: Tensor, k: Tensor, queue: Tensor) -> None:
    """Raises ValueError, with the shapes and the fix, when the loss cannot take these tensors. No host sync."""
    if q.dim() != 2 or k.shape != q.shape:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, queue {tuple(queue.shape)}"
        raise ValueError(f"q and k must both be (N, D), one row per image, got {shapes}")
    check_rows(q=q, k=k, queue=queue)


def refuse_forward_mode(q: Tensor) -> None:
    """Raises RuntimeError if q has a tangent, which torch would silently take for 0 in operators like the fast ones."""
    if unpack_dual(q).tangent is not None:
        raise RuntimeError("the fast losses have no forward-mode derivative (jvp): use --loss-kernel reference")


def check_loss_inputs(q: Tensor, k: Tensor, queue: Tensor) -> None:
    """Raises ValueError when shapes do not fit or rows are not unit vectors, as every kernel assumes.

    Syncs with the host, so it is for the first step and for debugging.
    """
    check_shapes(q, k, queue)
    for name, tensor in (("q", q), ("k", k), ("queue", queue)):
        # Rounding the elements changes the norm by at most eps / 2; 4 eps leave room for the normalisation itself.
        tolerance = max(4 * torch.finfo(tensor.dtype).eps, 1e-4)
        norm = torch.linalg.vector_norm(tensor.detach(), dim=1, dtype=torch.promote_types(tensor.dtype, torch.float32))
        bad = (~((norm - 1).abs() <= tolerance)).nonzero()  # "not <=" so that NaN counts as bad
        if len(bad):
            row = int(bad[0])
            raise ValueError(
                f"{len(bad)} of {len(norm)} rows of {name} {tuple(tensor.shape)} are not unit vectors (row {row} has "
                f"norm {norm[row]:.4g}): pass it through torch.nn.functional.normalize(..., dim=1) in float32"
            )
