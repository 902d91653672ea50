"""What torch.compile's backend, Inductor, is told about an encoder."""

from __future__ import annotations

from torch import nn

MODES = {"on": "default", "graphs": "reduce-overhead"}  # torch.compile's names
# Inductor writes a result to memory, in float32, if more than 30 operations went into it, or more than 4 tensors and it
# is used again. A batch norm reads 5, and the activations and gates of mobile networks use its result several times.
FUSE_MORE = {"realize_reads_threshold": 8, "realize_opcount_threshold": 60}


def inductor_options(encoder: nn.Module, how: str) -> dict[str, object]:
    """`options` for torch.compile; `how` is a key of MODES.

    Mobile networks get FUSE_MORE. By the code that torch 2.11 writes for an H200, EfficientNet-B0's kernels move half
    the bytes with it, MobileNetV3's a fifth less; ResNets and ViTs, which do not get it, would move more.
    """
    from torch import _inductor  # a second to import, and only where something is compiled

    options = _inductor.list_mode_options(MODES[how])
    if is_mobile(encoder):
        known = _inductor.list_options()  # they are not promised to stay
        options |= {name: value for name, value in FUSE_MORE.items() if name in known}
    return options


def is_mobile(encoder: nn.Module) -> bool:
    """Whether it has depthwise convolutions and batch norm, as MobileNets and EfficientNets do."""
    modules = list(encoder.modules())
    depthwise = any(isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1 for m in modules)
    return depthwise and any(isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm)) for m in modules)
