"""`fastssl preview DATA --policy v2 --output FILE`: a picture of images beside their two views, as training has them.

Every flag and recipe of `fastssl pretrain` is understood; those of the augmentation matter.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from fastssl.augment.preview import save_preview
from fastssl.build import open_policy
from fastssl.flags import parse
from fastssl.loaders.make import make_loader

COUNT = 8  # images, evenly spread over the data


def main(argv: Sequence[str]) -> int:
    """Writes the picture to --output, by default views.png, and says so."""
    config = parse(argv, "fastssl preview")
    output = Path(config.train.output or "views.png")
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder: name a file, such as {output / 'views.png'}")
    if not output.parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder {output.parent}, make it first")
    d = config.input
    loader = make_loader(
        d.loader,
        config.data,
        batch_size=1,
        seed=config.train.seed,
        device="cpu",
        workers=d.workers,
        on_bad_image=d.on_bad_image,
        synthetic_images=d.synthetic_images,
        synthetic_size=d.synthetic_size,
    )
    with closing(loader):
        batch = next(loader.eval_batches(COUNT, limit=COUNT), None)
        for bad in loader.bad_images:
            print(f"left out: {bad}", file=sys.stderr)
        if batch is None:
            raise ValueError(f"none of {min(COUNT, loader.num_images)} images of {config.data} can be read")
        save_preview(batch, open_policy(config), config.augment.image_size, config.train.seed, 0, output, COUNT)
    print(f"{output}: {min(COUNT, batch.size)} images and their views, policy {config.augment.policy}")
    return 0
