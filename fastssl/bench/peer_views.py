"""MoCo v2's colour operations, blur and flip for a batch of crops, in plain PyTorch: what follows FFCV's decoders.

As in FFCV-SSL, the order is fixed, hue is turned linearly in YIQ and nothing is clipped in between, so that all colour
operations are one affine map of each image's pixels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.augment.normalise import MEAN, STD

LUMA = (0.299, 0.587, 0.114)
TO_YIQ = torch.tensor((LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)))
FROM_YIQ = torch.linalg.inv(TO_YIQ)


def augment_crops(crops: Tensor) -> Tensor:
    """(B, 3, S, S) uint8 crops -> normalised float32 views: jitter, greyscale, blur, flip, as MoCo v2 asks."""
    x = crops.float() / 255
    matrix, offset = colour_maps(x)
    x = (torch.einsum("bij,bjhw->bihw", matrix, x) + offset[:, :, None, None]).clamp_(0, 1)
    half = torch.randperm(len(x), device=x.device)[: (len(x) + 1) // 2]  # a coin for each would have to be waited for
    x[half] = blur(x[half])
    flips = torch.rand(len(x), device=x.device) < 0.5
    x = torch.where(flips[:, None, None, None], x.flip(3), x)
    mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (MEAN, STD))
    return (x - mean) / std


def colour_maps(x: Tensor) -> tuple[Tensor, Tensor]:
    """Random brightness, contrast, saturation, hue and greyscale as a matrix (B, 3, 3) and an offset (B, 3)."""
    count, device = len(x), x.device
    jittered = torch.rand(count, device=device) < 0.8
    brightness, contrast, saturation = (
        torch.where(jittered, torch.empty(count, device=device).uniform_(0.6, 1.4), 1.0) for _ in range(3)
    )
    angle = torch.where(jittered, torch.empty(count, device=device).uniform_(-0.1, 0.1), 0.0) * 2 * math.pi
    saturation = torch.where(torch.rand(count, device=device) < 0.2, 0.0, saturation)  # greyscale
    luma, to_yiq, from_yiq = TO_YIQ[0].to(device), TO_YIQ.to(device), FROM_YIQ.to(device)
    turn = torch.eye(3, device=device).repeat(count, 1, 1)
    turn[:, 1, 1], turn[:, 1, 2], turn[:, 2, 1], turn[:, 2, 2] = angle.cos(), -angle.sin(), angle.sin(), angle.cos()
    hue = from_yiq @ turn @ to_yiq
    grey = luma.expand(3, 3)
    blend = saturation[:, None, None] * torch.eye(3, device=device) + (1 - saturation)[:, None, None] * grey
    colour = hue @ blend
    mean = brightness * (x.mean(dim=(2, 3)) @ luma)
    offset = ((1 - contrast) * mean)[:, None] * colour.sum(dim=2)
    return (brightness * contrast)[:, None, None] * colour, offset


def blur(x: Tensor) -> Tensor:
    """Gaussian blur with a sigma from U(0.1, 2) for each image; as in SimCLR, the kernel is a tenth of the side."""
    count, channels, size = x.shape[:3]
    radius = max(1, size // 20)
    sigma = torch.empty(count, 1, device=x.device).uniform_(0.1, 2.0)
    steps = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.softmax(-0.5 * (steps / sigma) ** 2, dim=1).repeat_interleave(channels, 0)[:, None, None]
    x = F.pad(x.reshape(1, count * channels, size, size), [radius] * 4, mode="reflect")
    x = F.conv2d(x, kernel, groups=count * channels)
    return F.conv2d(x, kernel.transpose(2, 3), groups=count * channels).reshape(count, channels, size, size)
