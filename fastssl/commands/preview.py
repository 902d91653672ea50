"""`fastssl preview DATA --policy v2 --output FILE`: a picture of images beside the two views training would see.

Takes every flag and recipe of `fastssl pretrain`, though only those of the data and the augmentation matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch
from PIL import Image

from fastssl.augment.preview import read_pictures, save_preview
from fastssl.build import make_config_loader, open_policy
from fastssl.config import replace
from fastssl.distributed import Ranks
from fastssl.flags import parse
from fastssl.plural import counted

COUNT = 8  # images, spread evenly over the data
DESCRIPTION = (
    "Draw images beside their two augmented views, into --output (views.png by default).\n\n"
    "Takes the flags and recipes of fastssl pretrain, though only those of the data and the augmentation matter."
)


def main(argv: Sequence[str]) -> int:
    """Writes the picture to --output, by default views.png, and prints one line about it."""
    config = parse(argv, "fastssl preview", DESCRIPTION)
    output = Path(config.train.output or "views.png")
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder: name a file, such as {output / 'views.png'}")
    if output.suffix.lower() in Image.registered_extensions().keys() - {".png"}:
        raise ValueError(f"--output {output}: the picture is a PNG file; name it {output.with_suffix('.png').name}")
    if not output.parent.is_dir():
        raise ValueError(f"--output {output}: the folder {output.parent} does not exist; create it first")
    few = replace(config, batch_size=1, accumulate=1, bn_splits=1)  # a picture can be drawn of a single image too
    with closing(make_config_loader(few, config.input.loader, Ranks(0, 1, torch.device("cpu")))) as loader:
        batch = read_pictures(loader, COUNT, config.data)
        save_preview(batch, open_policy(config), config.augment.image_size, config.train.seed, 0, output)
    print(f"{output}: {counted(batch.size, 'image')} with their views, policy {config.augment.policy}")
    return 0
