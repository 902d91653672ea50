"""`bench_throughput.py convert`: images/s of `fastssl prep beton`, and of decoding, resizing and encoding alone."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from contextlib import closing
from pathlib import Path

from PIL import Image

from fastssl.arguments import positive
from fastssl.bench.compare import announce
from fastssl.bench.results import invert, write_result
from fastssl.bench.timing import read_in_turn, summarise_all, wall_clock
from fastssl.data_prep.find import find_images
from fastssl.data_prep.prepare import Store, encode_jpeg, shrink
from fastssl.data_prep.sources import Selection
from fastssl.data_prep.work_pool import Work, WorkPool
from fastssl.data_prep.write_beton import write_beton
from fastssl.machine.limits import usable_cores

ALONE = "decode + resize + encode alone"


def convert_bare(path: str) -> None:
    """The work that no conversion can avoid: decodes a file, reduces its short side to 256, encodes it.

    Raises ValueError for a file that cannot be decoded, which a conversion would leave out.
    """
    try:
        with Image.open(path) as file:
            file.draft(None, (512, 512))
            encode_jpeg(shrink(file.convert("RGB"), 256), 90)
    except OSError as error:
        raise ValueError(f"{os.path.realpath(path)} cannot be decoded ({error}): remove it") from None


def link_copies(data: str, folder: Path, copies: int) -> int:
    """Fills a folder with `copies` links to every image of `data`. Returns the number of links."""
    images = find_images(data)
    for copy in range(copies):
        for i in range(len(images.paths)):
            target = folder / f"class{copy:03d}" / f"{i:07d}{Path(images.paths[i]).suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(os.path.abspath(images.path(i)))
    return copies * len(images.paths)


def main(argv: list[str]) -> None:
    """Measures, prints, and writes JSON."""
    parser = argparse.ArgumentParser(prog="bench_throughput.py convert", description=__doc__)
    add = parser.add_argument
    add("data", help="image folder")
    add("--copies", type=positive, default=8, help="how many times to convert each image (default 8)")
    add("--rounds", type=positive, default=5, help="measurements of each contestant (default 5)")
    add("--workers", type=positive, default=usable_cores(), help="processes (default all cores)")
    add("--scratch", help="folder to write to (default: the system's for temporary files)")
    add("--output", type=Path, help="write the result to this JSON file")
    args = parser.parse_args(argv)
    with (
        tempfile.TemporaryDirectory(dir=args.scratch) as scratch,
        closing(WorkPool(convert_bare, args.workers)) as pool,
    ):
        folder, out = Path(scratch, "images"), Path(scratch, "x.beton")
        count = link_copies(args.data, folder, args.copies)
        paths = [find_images(folder).path(i) for i in range(count)]
        parts = [paths[first : first + 16] for first in range(0, count, 16)]

        def beton(store: Store) -> object:
            return write_beton(folder, out, store, Selection(), Work(args.workers), force=True)

        stages = {
            ALONE: lambda: [pool.results(ticket) for ticket in [pool.submit(part) for part in parts]],
            "short side 256": lambda: beton(Store()),
            "originals": lambda: beton(Store(originals=True)),
        }
        settings = {"images": count, "workers": args.workers}
        announce(settings)

        def keep(seconds: dict[str, list[float]]) -> None:
            write_result(args.output, as_result(seconds, settings))

        seconds = read_in_turn({name: wall_clock(convert) for name, convert in stages.items()}, args.rounds, keep)
    for line in as_result(seconds, settings)["lines"]:
        spread = f"({line['low']:.0f} to {line['high']:.0f})"
        print(f"{line['what']:32} {line['images_per_s']:8.0f} images/s {spread}  {line['share_of_alone']:6.2f} x alone")


def as_result(seconds: dict[str, list[float]], settings: dict[str, int]) -> dict[str, object]:
    """The JSON of the rounds so far: images/s of each contestant, and their share of the rate of the work alone."""
    timings, lines = summarise_all(seconds), []
    for name, timing in timings.items():
        rate, share = invert(timing, settings["images"]), timings[ALONE].median / timing.median
        found = {"images_per_s": rate.median, "low": rate.low, "high": rate.high, "share_of_alone": share}
        lines.append({"what": name, **found})
    return {**settings, "rounds": timing.rounds, "ended": time.ctime(), "lines": lines}
