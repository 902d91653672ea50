"""The peers of `bench_throughput.py augment`: torchvision, kornia and triton-augment (DALI is in `augment_dali`)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchvision.transforms.v2 as T
from torch import Tensor

from fastssl.augment.normalise import MEAN, STD
from fastssl.augment.policy import Policy, make_policy
from fastssl.batch import ImageBatch
from fastssl.bench.classical_views import pillow_blur
from fastssl.bench.timing import Function


def torchvision_chain(policy: Policy, size: int, on_pil: bool) -> T.Compose:
    """The policy as a torchvision user writes it, for one image at a time."""
    crop = T.RandomResizedCrop(size, policy.crop_scale, antialias=True)
    grey = T.RandomGrayscale(policy.grey_p)
    jitter = T.ColorJitter(policy.brightness, policy.contrast, policy.saturation, policy.hue)
    jitter = T.RandomApply([jitter], policy.jitter_p)
    colours = [grey, jitter] if policy.grey_first else [jitter, grey]
    blur = T.Lambda(pillow_blur) if on_pil else T.GaussianBlur(blur_side(size), policy.blur_sigma)
    blurs = [T.RandomApply([blur], policy.blur_p)] if policy.blur_p > 0 else []
    normalise = [T.ToImage(), T.ToDtype(torch.float32, scale=True), T.Normalize(MEAN, STD)]
    return T.Compose([crop, *colours, *blurs, T.RandomHorizontalFlip(policy.flip_p), *normalise])


def blur_side(size: int) -> int:
    """The side of the blur's kernel for views of `size` pixels, which are reflected at their edges: 17 if they can."""
    return min(17, 2 * size - 1)


def per_image(images: list, chain: Callable, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Both views of every image, made one by one, stacked into batches as a DataLoader does, and put on the device."""
    view_q, view_k = zip(*[(chain(image), chain(image)) for image in images])
    return torch.stack(view_q).to(device, dtype), torch.stack(view_k).to(device, dtype)


def make_kornia(batch: ImageBatch, policy: Policy, size: int, dtype: torch.dtype) -> Function:
    """A call that makes both views with kornia's modules, compiled, from a batch of images of one size."""
    import kornia.augmentation as K

    jitter = (policy.brightness, policy.contrast, policy.saturation, policy.hue)
    colours = [K.ColorJitter(*jitter, p=policy.jitter_p), K.RandomGrayscale(p=policy.grey_p)]
    if policy.grey_first:
        colours.reverse()
    blur = K.RandomGaussianBlur((blur_side(size), blur_side(size)), policy.blur_sigma, p=policy.blur_p)
    blurs = [blur] if policy.blur_p > 0 else []
    chain = torch.nn.Sequential(
        K.RandomResizedCrop((size, size), scale=policy.crop_scale),
        *colours,
        *blurs,
        K.RandomHorizontalFlip(p=policy.flip_p),
        K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    )
    images = _in_one_tensor(batch, dtype)
    torch.compiler.reset()  # earlier sizes count towards the limit beyond which torch stops compiling
    compiled = torch.compile(chain)
    return lambda: (compiled(images), compiled(images))


def part_policy(batch: ImageBatch, policy: Policy, size: int) -> Policy:
    """The part of a policy that triton-augment can do on square images: crops without resizing, flip, greyscale, and
    jitter without hue, which it applies to every image.
    """
    share = (size / batch.max_side) ** 2
    kept = ("brightness", "contrast", "saturation", "flip_p", "grey_p")
    changed = {"crop_scale": (share, share), "crop_ratio": (1.0, 1.0), "jitter_p": 1.0, "hue": 0.0, "blur_p": 0.0}
    return make_policy("v2", **changed, **{name: getattr(policy, name) for name in kept})


def make_triton_augment(batch: ImageBatch, part: Policy, size: int, dtype: torch.dtype) -> Function:
    """A call that makes both views of `part_policy` with triton-augment, whose contrast is around 0.5, order fixed."""
    import triton_augment

    jitter = {name: getattr(part, name) for name in ("brightness", "contrast", "saturation")}
    augment = triton_augment.TritonFusedAugment(
        crop_size=size, horizontal_flip_p=part.flip_p, grayscale_p=part.grey_p, mean=MEAN, std=STD, **jitter
    )
    images = _in_one_tensor(batch, dtype)
    return lambda: (augment(images), augment(images))


def equal_sizes(batch: ImageBatch, square: bool = False) -> bool:
    """Whether all images have the same size, and with `square` also equal sides."""
    sides = torch.stack([batch.height, batch.width])
    return bool((sides == sides[:, :1]).all()) and (not square or bool((sides == sides[:1]).all()))


def _in_one_tensor(batch: ImageBatch, dtype: torch.dtype) -> Tensor:
    """All images as (B, 3, H, W) in 0..1."""
    return torch.stack([batch.image(i) for i in range(batch.size)]).permute(0, 3, 1, 2).contiguous().to(dtype) / 255
