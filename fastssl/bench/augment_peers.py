"""Views by others, for `bench_throughput.py augment`: by torchvision and kornia, and what triton-augment can do."""

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
    jitter = T.ColorJitter(policy.brightness, policy.contrast, policy.saturation, policy.hue)
    blur = T.Lambda(pillow_blur) if on_pil else T.GaussianBlur(17, policy.blur_sigma)
    grey = T.RandomGrayscale(policy.grey_p)
    chain = [T.RandomResizedCrop(size, policy.crop_scale, antialias=True)]
    chain += [grey] * policy.grey_first + [T.RandomApply([jitter], policy.jitter_p)] + [grey] * (not policy.grey_first)
    chain += [T.RandomApply([blur], policy.blur_p)] * (policy.blur_p > 0) + [T.RandomHorizontalFlip(policy.flip_p)]
    return T.Compose([*chain, T.ToImage(), T.ToDtype(torch.float32, scale=True), T.Normalize(MEAN, STD)])


def per_image(images: list, chain: Callable, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both views of every image, one by one, stacked to batches as a DataLoader does."""
    view_q, view_k = zip(*[(chain(image), chain(image)) for image in images])
    return torch.stack(view_q).to(dtype), torch.stack(view_k).to(dtype)


def make_kornia(batch: ImageBatch, policy: Policy, size: int, dtype: torch.dtype) -> Function:
    """kornia's modules, compiled, on a batch of equal images."""
    import kornia.augmentation as K

    jitter = (policy.brightness, policy.contrast, policy.saturation, policy.hue)
    colours = [K.ColorJitter(*jitter, p=policy.jitter_p), K.RandomGrayscale(p=policy.grey_p)]
    blur = [K.RandomGaussianBlur((17, 17), policy.blur_sigma, p=policy.blur_p)] * (policy.blur_p > 0)
    chain = torch.nn.Sequential(
        K.RandomResizedCrop((size, size), scale=policy.crop_scale),
        *(reversed(colours) if policy.grey_first else colours),
        *blur,
        K.RandomHorizontalFlip(p=policy.flip_p),
        K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    )
    images = _in_one_tensor(batch, dtype)
    torch.compiler.reset()  # what it compiled for other sizes counts towards the limit from where it runs uncompiled
    compiled = torch.compile(chain)
    return lambda: (compiled(images), compiled(images))


def part_policy(batch: ImageBatch, policy: Policy, size: int) -> Policy:
    """What triton-augment can do of a policy, on square images: a crop that is not resized, flip, jitter without hue on
    every image, greyscale."""
    share = (size / batch.max_side) ** 2
    strengths = {name: getattr(policy, name) for name in ("brightness", "contrast", "saturation")}
    others = {"flip_p": policy.flip_p, "grey_p": policy.grey_p}
    return make_policy("v2", crop_scale=(share, share), crop_ratio=(1.0, 1.0), jitter_p=1.0, hue=0.0, blur_p=0.0,
                       **strengths, **others)  # fmt: skip


def make_triton_augment(batch: ImageBatch, part: Policy, size: int, dtype: torch.dtype) -> Function:
    """triton-augment's one kernel for `part_policy`, on a GPU; its contrast turns on 0.5, its order is fixed."""
    import triton_augment

    jitter = {name: getattr(part, name) for name in ("brightness", "contrast", "saturation")}
    augment = triton_augment.TritonFusedAugment(
        crop_size=size, horizontal_flip_p=part.flip_p, grayscale_p=part.grey_p, mean=MEAN, std=STD, **jitter
    )
    images = _in_one_tensor(batch, dtype)
    return lambda: (augment(images), augment(images))


def equal_sizes(batch: ImageBatch, square: bool = False) -> bool:
    """Have all images one size, or even one side?"""
    sides = torch.stack([batch.height, batch.width])
    return bool((sides == sides[:, :1]).all()) and (not square or bool((sides == sides[:1]).all()))


def _in_one_tensor(batch: ImageBatch, dtype: torch.dtype) -> Tensor:
    """(B, 3, H, W) in 0..1."""
    return torch.stack([batch.image(i) for i in range(batch.size)]).permute(0, 3, 1, 2).contiguous().to(dtype) / 255
