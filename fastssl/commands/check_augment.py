"""`fastssl check-augment [DATA]`: compares our augmentation with Pillow's and torchvision's, and with its own policy.

It runs on the images of DATA, or on pictures it draws. Exits with 0 when every bound holds, with 1 otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing

import numpy as np

from fastssl.arguments import ListParser, positive
from fastssl.augment.parity import Row, chain_rows, operation_rows
from fastssl.augment.policy import POLICIES, make_policy
from fastssl.augment.preview import read_pictures
from fastssl.augment.rates import DRAWS, anchor_check, count_checks
from fastssl.batch import ImageBatch, pack_images
from fastssl.command import FAILED
from fastssl.demo_images import CLASSES, draw_picture
from fastssl.loaders.make import make_loader
from fastssl.plural import counted


def main(argv: Sequence[str]) -> int:
    """Prints the tables; returns 0 when every bound holds and 1 otherwise."""
    parser = ListParser(
        prog="fastssl check-augment",
        description="Compare our augmentation with Pillow's and torchvision's, and with its own policy.",
    )
    parser.add_argument("data", nargs="?", help="a folder of images (default: pictures drawn for the purpose)")
    parser.add_argument("--images", type=positive, default=16, help="images used, spread over the folder (default: 16)")
    parser.add_argument("--size", type=positive, default=96, help="side of the views in pixels (default: 96)")
    parser.add_argument("--policy", nargs="+", choices=list(POLICIES), default=["v1", "v2", "small"],
                        help="policies to check (default: v1 v2 small)")  # fmt: skip
    args = parser.parse_args(argv)
    batch = read_folder(args.data, args.images) if args.data else draw_pictures(args.images)
    print(f"{counted(batch.size, 'picture')}, views of {args.size} pixels; errors in units of 1/255\n")
    print(f"{'operation':34} {'mean':>8} {'max':>8} {'mean <=':>8} {'max <=':>8}")
    good = [print_row(row) for row in operation_rows(batch, args.size)]
    good += [print_row(row) for row in chain_rows(batch, args.size, args.policy)]
    for name in args.policy:
        print(f"\npolicy {name}, {DRAWS:,} draws")
        good += [print_check(*check) for check in count_checks(make_policy(name))]
    print()
    good.append(print_check(*anchor_check()))
    print(f"\n{good.count(True)} of {len(good)} checks passed")
    return 0 if all(good) else FAILED


def print_row(row: Row) -> bool:
    """Prints one line of errors; returns whether they are within their bounds."""
    bounds = ["" if math.isinf(bound) else f"{bound:g}" for bound in (row.mean_bound, row.max_bound)]
    verdict = "" if row.holds else "  FAILS"
    print(f"{row.name:34} {row.mean:8.4f} {row.max:8.2f} {bounds[0]:>8} {bounds[1]:>8}{verdict}", flush=True)
    return row.holds


def print_check(name: str, holds: bool, found: str) -> bool:
    """Prints one count; returns whether it is what the policy says."""
    print(f"{name:40} {found}{'' if holds else '  FAILS'}", flush=True)
    return holds


def read_folder(folder: str, count: int) -> ImageBatch:
    """`count` images spread evenly over a folder. Raises ValueError when it has none, or none that can be read."""
    with closing(make_loader("folder", folder, batch_size=1, seed=0, device="cpu")) as loader:
        return read_pictures(loader, count, folder)


def draw_pictures(count: int) -> ImageBatch:
    """Drawn pictures of many sizes and colours, every fifth of them grey."""
    pictures = []
    for i in range(count):
        rng = np.random.default_rng(i)
        picture = draw_picture(list(CLASSES)[i % len(CLASSES)], rng, 128 + 16 * (i % 7))
        picture = picture[: len(picture) * 3 // (3 + i % 3)]
        pictures.append(np.repeat(picture[..., :1], 3, axis=2) if i % 5 == 4 else picture)
    return pack_images(pictures, range(count), [0] * count)
