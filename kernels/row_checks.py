"""What every pass over rows asks of its tensors."""

from __future__ import annotations

from torch import Tensor


def check_rows(contiguous: bool = True, **tensors: Tensor) -> None:
    """Raises ValueError, with the shapes and the fix, unless all are rows of one length on one device. No sync.

    contiguous: the rows must lie one after another, as a kernel reads them. Names are those the message uses.
    """
    leader, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or tensor.shape[1] != first.shape[-1]:
            refuse(f"{name} must have a row for each feature vector, with the D of {leader}", tensors)
        if tensor.shape[0] == 0 or tensor.shape[1] == 0:
            refuse(f"{name} is empty, where at least one row is needed", tensors)
        if not tensor.is_floating_point():
            refuse(f"{name} must be a floating-point tensor, not {tensor.dtype}: convert it with .float()", tensors)
        if tensor.device != first.device:
            places = f"{leader} is on {first.device} but {name} on {tensor.device}"
            refuse(f"{places}: move both to one device", tensors)
        if contiguous and not tensor.is_contiguous():
            refuse(f"{name} is not contiguous: store its rows one after another, .contiguous()", tensors)


def refuse(problem: str, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError; its words are put together here alone, since a compiler cannot follow how."""
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    raise ValueError(f"{problem} (got {shapes})")
