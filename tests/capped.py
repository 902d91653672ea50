"""A process of its own that evaluates many wide features under --max-mem-gb: `python capped.py CAP_GB_MORE | none`."""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
from torch import nn

from fastssl.distributed import Ranks
from fastssl.eval import knn, linear
from fastssl.eval.images import ArrayImages
from fastssl.eval.memory import GB, peak_memory
from fastssl.eval.options import finish_options
from fastssl.eval.session import Session

TRAIN, VAL, WIDTH, CLASSES = 20_000, 500, 2048, 5  # 164 MB of features
CPU = torch.device("cpu")
FLAGS = ["nowhere", "--image-size", "4", "--resize", "4", "-b", "256", "-j", "1"]


class Wide(nn.Module):
    """Many features of few pixels, all of them float16 numbers, so that features on disk are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.randn(48, WIDTH, generator=torch.Generator().manual_seed(0)) / 7

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images.flatten(1) @ self.weight).half().float()


def make_images(seed: int, num: int) -> ArrayImages:
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, num)
    pixels = np.clip(random.normal(100 + 10 * labels[:, None, None, None], 40, (num, 4, 4, 3)), 0, 255)
    return ArrayImages(pixels.astype(np.uint8), labels, [str(c) for c in range(CLASSES)], CPU)


def evaluate(module, parser, *flags: str, cap: float | None) -> dict:
    options = finish_options(parser.parse_args([*FLAGS, *flags]))
    options.max_mem_gb = cap
    session = Session(options, Ranks(0, 1, CPU))
    session.open_backbone = lambda *_: Wide()
    module.open_splits = lambda *_: (make_images(0, TRAIN), make_images(1, VAL))
    return module.evaluate(session)


def main(more: str) -> None:
    torch.set_num_threads(1)
    before = peak_memory() / GB
    cap = None if more == "none" else before + float(more)
    found = evaluate(knn, knn.make_knn_parser(), "-k", "21", cap=cap)
    found |= evaluate(
        linear, linear.make_linear_parser(), "--protocol", "cached", "--epochs", "1", "--lrs", "0.1,1", cap=cap
    )
    result = {name: found[name] for name in ("accuracy", "weighted_accuracy", "settings")}
    print(json.dumps({"result": result, "before": before, "cap": cap, "peak": peak_memory() / GB}))


if __name__ == "__main__":
    main(sys.argv[1])
