"""MoCo v2's augmentation (arXiv 2003.04297) as a torchvision user writes it for Pillow images: for the peers."""

from __future__ import annotations

import random

from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms

from fastssl.augment.normalise import MEAN, STD


class TwoViews:
    """Turns a Pillow image into two augmented views, each (3, size, size) float32."""

    def __init__(self, size: int) -> None:
        jitter = transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
                transforms.RandomApply([jitter], p=0.8),
                transforms.RandomGrayscale(p=0.2),
                transforms.RandomApply([pillow_blur], p=0.5),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __call__(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        return self.transform(image), self.transform(image)


def pillow_blur(image: Image.Image) -> Image.Image:
    """Pillow's gaussian blur with a sigma from U(0.1, 2)."""
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
