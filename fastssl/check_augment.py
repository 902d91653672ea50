"""`fastssl check-augment [DATA]`: our augmentation against Pillow and torchvision, and against its own policy.

Without DATA on pictures rendered here, with it on that folder's. The exit code says whether all bounds hold.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import closing

import numpy as np

from fastssl.arguments import ListParser
from fastssl.augment.parity import Row, chain_rows, operation_rows
from fastssl.augment.policy import POLICIES, make_policy
from fastssl.augment.rates import anchor_check, count_checks
from fastssl.batch import ImageBatch, pack_images
from fastssl.command import FAILED
from fastssl.demo_images import CLASSES, draw_picture
from fastssl.loaders.folder_loader import FolderLoader


def main(argv: Sequence[str]) -> int:
    """Prints the tables; 0 when every bound holds, else 1."""
    parser = ListParser(prog="fastssl check-augment", description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", help="a folder of images; by default pictures rendered here")
    parser.add_argument("--images", type=int, default=16, help="how many, evenly spread over the folder")
    parser.add_argument("--size", type=int, default=96, help="of the views, in pixels")
    parser.add_argument("--policy", nargs="+", choices=list(POLICIES), default=["v1", "v2", "small"])
    args = parser.parse_args(argv)
    if args.images < 1 or args.size < 1:
        raise ValueError(f"--images and --size must be at least 1, got {args.images} and {args.size}")
    batch = read_pictures(args.data, args.images) if args.data else render_pictures(args.images)
    print(f"{batch.size} pictures, views of {args.size} pixels; errors in 1/255\n")
    print(f"{'operation':34} {'mean':>8} {'max':>8} {'mean <=':>8} {'max <=':>8}")
    good = [print_row(row) for row in operation_rows(batch, args.size)]
    good += [print_row(row) for row in chain_rows(batch, args.size, args.policy)]
    for name in args.policy:
        print(f"\npolicy {name}, 20,000 draws")
        good += [print_check(*check) for check in count_checks(make_policy(name))]
    print()
    good.append(print_check(*anchor_check()))
    print(f"\n{good.count(True)} of {len(good)} hold")
    return 0 if all(good) else FAILED


def print_row(row: Row) -> bool:
    """Prints one line of errors and returns whether they keep their bounds."""
    bounds = ["" if math.isinf(bound) else f"{bound:g}" for bound in (row.mean_bound, row.max_bound)]
    verdict = "" if row.holds else "  TOO FAR"
    print(f"{row.name:34} {row.mean:8.4f} {row.max:8.2f} {bounds[0]:>8} {bounds[1]:>8}{verdict}", flush=True)
    return row.holds


def print_check(name: str, holds: bool, found: str) -> bool:
    """Prints one count and returns whether it is as the policy has it."""
    print(f"{name:40} {found}{'' if holds else '  WRONG'}", flush=True)
    return holds


def read_pictures(folder: str, count: int) -> ImageBatch:
    """`count` images of a folder, evenly spread; one that cannot be read is named and left out.

    Raises ValueError for a folder without images, and when none of them can be read.
    """
    with closing(FolderLoader(folder, batch_size=1, seed=0, device="cpu")) as loader:
        batch = next(loader.eval_batches(count, limit=count), None)
        for bad in loader.bad_images:
            print(f"left out: {bad}", file=sys.stderr)
        if batch is None:
            raise ValueError(f"none of {min(count, loader.num_images)} images of {folder} can be read")
    return batch


def render_pictures(count: int) -> ImageBatch:
    """Pictures of many sides and colours, every fifth of them grey."""
    pictures = []
    for i in range(count):
        rng = np.random.default_rng(i)
        picture = draw_picture(list(CLASSES)[i % len(CLASSES)], rng, 128 + 16 * (i % 7))
        picture = picture[: len(picture) * 3 // (3 + i % 3)]
        pictures.append(np.repeat(picture[..., :1], 3, axis=2) if i % 5 == 4 else picture)
    return pack_images(pictures, range(count), [0] * count)
