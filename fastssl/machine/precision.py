"""The arithmetic of the encoders: fp32, or a 16-bit type where the device computes in one."""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type in which the encoders compute, for what `choose_precision` says."""
    return DTYPES[choose_precision(precision, device)]


def choose_precision(precision: str, device: torch.device) -> str:
    """fp32, bf16 or fp16; "auto" stands for a 16-bit type where the device computes in one."""
    return explain_precision(precision, device)[0]


def explain_precision(precision: str, device: torch.device) -> tuple[str, str]:
    """`choose_precision`, and why in a few words."""
    if precision != "auto":
        slow = ", though slow: this CPU imitates bf16" if imitated(precision, device) else ""
        return precision, f"requested{slow}"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU supports it"
        return "fp16", "this GPU has no bf16"
    if device.type == "cpu" and (unit := bf16_unit()):
        return "bf16", f"this CPU has {unit}"
    return "fp32", f"no 16-bit arithmetic on this {device.type}"


def imitated(precision: str, device: torch.device) -> bool:
    """Whether the device is a CPU that is known to have no instructions for bf16, and bf16 is what was asked for."""
    return precision == "bf16" and device.type == "cpu" and hasattr(torch.cpu, "get_capabilities") and not bf16_unit()


def bf16_unit() -> str:
    """The CPU's instructions for bf16 products, or "" if it has none or torch (before 2.10) cannot tell."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    for name, unit in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16")):
        if capabilities.get(name):
            return unit
    return ""
