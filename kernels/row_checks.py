"""What every pass over rows asks of its tensors."""

from __future__ import annotations

from torch import Tensor


def check_rows(contiguous: bool = True, **tensors: Tensor) -> None:
    """Raises ValueError, with the shapes and the fix, unless all are rows of one length on one device. No sync.

    contiguous: the rows must lie one after another, as a kernel reads them. Names are those the message uses.
    """
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    leader, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or tensor.shape[1] != first.shape[-1]:
            raise ValueError(f"{name} must have a row for each feature vector, with the D of {leader}, got {shapes}")
        if 0 in tensor.shape:
            raise ValueError(f"{name} is empty: {', '.join(tensors)} need at least one row each, got {shapes}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {tensor.dtype}: convert it with .float()")
        if tensor.device != first.device:
            where = f"{leader} is on {first.device} but {name} on {tensor.device}"
            raise ValueError(f"{where}: move both to one device ({shapes})")
        if contiguous and not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous: store its rows one after another, .contiguous() ({shapes})")
