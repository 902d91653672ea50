"""The floor of a training step: the least time that its operations can take, by rates measured on the device.

Arithmetic: the encoders' operations as torch's FlopCounterMode counts them (a forward for q and for k, twice a forward
for the gradients of q, without that of the images) and the loss's matrix products, at the rate of a large matrix
product. Memory: in a forward, each convolution and linear layer reads its input and writes its output once; in the
backward it reads its input and the gradient of its output and writes the gradient of its input, the first one not;
everything else is fused; at the rate of a large copy.

Operations are those of direct convolutions. A step can beat the floor with fewer: by Winograd's way
(`cpu_conv_winograd.py`, and cuDNN's) or by leaving the padding out (`cpu_conv_rows.py`).
"""

from __future__ import annotations

from math import prod

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastssl.bench.loss import make_ceilings
from fastssl.bench.timing import time_in_turn
from fastssl.config import Config
from fastssl.machine.precision import compute_dtype
from fastssl.models.encoders import make_encoder
from fastssl.plan import directions


def step_floor(config: Config, device: torch.device) -> dict[str, float]:
    """The operations and bytes of a step, the rates of the device, and the seconds that follow for either."""
    operations, elements = count_encoder(config)
    batch, queue, dim = config.train.batch_size * directions(config), config.moco.queue_size, config.model.dim
    products = 1 + (config.loss.contrast_weight > 0) + (config.loss.uniform_weight > 0)
    operations += 2 * batch * queue * dim * products
    dtype = compute_dtype(config.train.precision, device)
    itemsize, ceilings = dtype.itemsize, make_ceilings(device, dtype)
    timings = time_in_turn({name: call for name, (call, _) in ceilings.items()}, device, rounds=5)
    rates = {name: work / timings[name].median for name, (_, work) in ceilings.items()}
    arithmetic, memory = operations / rates["matmul"], elements * itemsize / rates["copy"]
    return {
        "operations": operations,
        "bytes": elements * itemsize,
        "matmul_per_second": rates["matmul"],
        "copy_bytes_per_second": rates["copy"],
        "arithmetic_seconds": arithmetic,
        "memory_seconds": memory,
    }


def count_encoder(config: Config) -> tuple[float, float]:
    """(operations, elements read and written) of both encoders in one step, counted on meta tensors."""
    m, size = config.model, config.augment.image_size
    with torch.device("meta"):
        encoder = make_encoder(m.arch, head=m.head, dim=m.dim, stem=m.stem).eval()
        images = torch.empty(config.train.batch_size * directions(config), 3, size, size)
    elements = spared = 0

    def count(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal elements, spared
        if not elements:  # the first layer: nobody asks for the gradient of the images
            elements -= prod(inputs[0].shape)
            spared += 2 * prod(output.shape) * prod(module.weight.shape[1:])
        elements += 4 * prod(inputs[0].shape) + 3 * prod(output.shape)

    for module in encoder.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder(images)
    return 4.0 * counter.get_total_flops() - spared, float(elements)
