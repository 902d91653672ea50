"""A static view set: each image beside views of it that never change, for instance discrimination and statistics.

    <out>/<class>/<stem>-0.jpeg    the image
    <out>/<class>/<stem>-1.jpeg    its views: -1 and -2, and masked ones up to -10 (see view_pairs.py)
    <out>.json                     what made it

The names and the layout are those of the small-model project (arXiv 2107.14762), so its scripts read it too; beyond
them, which images are taken (the first by name) and every random choice are a function of --seed alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

from fastssl.command import run_command
from fastssl.data_prep.images import BadImage, ImageFolder, decode_image, find_images
from fastssl.data_prep.view_pairs import AUGS, count_views, make_view_pair
from fastssl.data_prep.work_pool import Died, WorkPool, ahead, usable_cores

_CHUNK = 4  # images handed out together


class Job(NamedTuple):
    """One image to draw views of."""

    source: str
    target: str  # <out>/<class>/<stem>, without -0.jpeg
    aug: str
    seed: int
    quality: int


class Outcome(NamedTuple):
    """What became of a job."""

    error: str  # empty: written
    in_band: bool


def make_static_views(
    data: str, out: str, aug: str = "moco", images_per_class: int = 50, seed: int = 0, workers: int | None = None,
    quality: int = 75,
) -> list[str]:  # fmt: skip
    """Writes the view set of the images in `data`/<class>/ and returns notes on what a person should know.

    A set that was begun with the same options is finished, not begun again. An image that cannot be read is named and
    the next of its class takes its place.
    Raises ValueError for a flat folder, two images of one name in a class, and an `out` that was made with other
    options or lies among the images.
    """
    if images_per_class < 1 or (workers is not None and workers < 1):
        raise ValueError("--images-per-class and --workers must be at least 1")
    if not 1 <= quality <= 95:
        raise ValueError(f"--quality must lie in 1 to 95, got {quality}")
    folder = find_images(data)
    if not folder.class_names:
        raise ValueError(f"{data} holds images without classes: a view set needs <class>/ folders")
    if Path(out).resolve().is_relative_to(Path(folder.root).resolve()):
        raise ValueError(f"{out} lies inside {folder.root}: the views would become images of it; choose another folder")
    options = {"aug": aug, "seed": seed, "quality": quality}  # more images a class may be added later
    _claim(Path(out), options)
    queues = {name: iter(jobs) for name, jobs in _jobs(folder, out, options).items()}
    todo = {name: images_per_class for name in queues}
    notes: list[str] = []
    odd = 0
    while jobs := [(name, job) for name, count in todo.items() for job in _take(queues[name], count)]:
        todo = dict.fromkeys(queues, 0)
        outcomes = _run([job for _, job in jobs], workers)
        for (name, _), outcome in zip(jobs, tqdm(outcomes, total=len(jobs), unit="image", disable=None)):
            if outcome.error:
                notes.append(f"left out: {outcome.error}")
                todo[name] += 1
            odd += not outcome.in_band
    if odd:
        notes.append(
            f"{odd} images have no crops in the band of --aug {aug} that were found: their last ones were used"
        )
    return notes


def _claim(out: Path, options: dict) -> None:
    """Writes, or agrees with, `out`.json."""
    manifest = out.with_name(out.name + ".json")
    out.mkdir(parents=True, exist_ok=True)
    if manifest.exists():
        made = json.loads(manifest.read_text())
        if wrong := [key for key in options if made.get(key) != options[key]]:
            flags = " ".join(f"--{key.replace('_', '-')} {made.get(key)}" for key in wrong)
            raise ValueError(f"{out} was made with {flags}: give the same, or choose another folder")
        return
    if any(out.iterdir()):
        raise ValueError(f"{out} is not empty and {manifest.name} is not beside it: choose an empty folder")
    partial = manifest.with_name(manifest.name + ".partial")
    partial.write_text(json.dumps(options, indent=1) + "\n")
    os.replace(partial, manifest)


def _jobs(folder: ImageFolder, out: str, options: dict) -> dict[str, list[Job]]:
    """Every image of every class in the order of their names; the stem ends at the first dot."""
    jobs: dict[str, list[Job]] = {name: [] for name in folder.class_names}
    seen: dict[str, str] = {}
    for i, path in enumerate(folder.paths):
        name = folder.class_names[folder.labels[i]]
        target = os.path.join(out, name, os.path.basename(path).split(".")[0])
        if target in seen:
            raise ValueError(f"{seen[target]} and {path} would both be {target}-0.jpeg: rename one of them")
        seen[target] = path
        digest = hashlib.sha256(f"{options['seed']}/{options['aug']}/{path}".encode("utf-8", "surrogateescape"))
        seed = int.from_bytes(digest.digest()[:8], "big") >> 1
        jobs[name].append(Job(folder.path(i), target, options["aug"], seed, options["quality"]))
    return jobs


def _take(jobs: Iterator[Job], count: int) -> list[Job]:
    return [job for _, job in zip(range(count), jobs)]


def _run(jobs: Sequence[Job], workers: int | None) -> Iterator[Outcome]:
    """Outcomes in the order of the jobs; an image that kills the process that decodes it is one that cannot be read."""
    workers = min(workers or usable_cores(), len(jobs))
    if workers == 1:
        yield from map(draw, jobs)
        return
    with closing(WorkPool(draw, workers)) as pool:
        begun = (pool.submit(jobs[i : i + _CHUNK]) for i in range(0, len(jobs), _CHUNK))
        for ticket in ahead(begun, 2 * workers):
            for job, outcome in zip(ticket.items, pool.results(ticket)):
                yield Outcome(f"{job.source}: its decoder crashes", True) if isinstance(outcome, Died) else outcome


def draw(job: Job) -> Outcome:
    """Writes one image and its views, each file whole or not at all, the last one last: where it is, all are."""
    count = count_views(job.aug)
    if os.path.exists(f"{job.target}-{count}.jpeg"):
        return Outcome("", True)
    try:
        image = Image.fromarray(decode_image(job.source))
        views, in_band = make_view_pair(image, job.aug, job.seed)
    except BadImage as error:
        return Outcome(str(error), True)
    except ValueError as error:
        return Outcome(f"{job.source}: {error}", True)
    os.makedirs(os.path.dirname(job.target), exist_ok=True)
    for number, view in enumerate([image, *views]):
        path = f"{job.target}-{number}.jpeg"
        view.save(path + ".partial", format="JPEG", quality=job.quality)
        os.replace(path + ".partial", path)
    return Outcome("", in_band)


def main(argv: Sequence[str]) -> int:
    """`fastssl prep views`."""
    parser = argparse.ArgumentParser("fastssl prep views", description="Write a static view set.", allow_abbrev=False)
    parser.add_argument("data", help="folder with <class>/ folders of images")
    parser.add_argument("savedir", help="folder for <class>/<stem>-{0,1,2,...}.jpeg")
    parser.add_argument("--aug", default="moco", choices=AUGS, help="how the two views are drawn (default: moco)")
    parser.add_argument("--images-per-class", type=int, default=50, help="the first of each class (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="every random choice is a function of it (default: 0)")
    parser.add_argument("--workers", type=int, help="processes (default: one for each core)")
    parser.add_argument("--quality", type=int, default=75, help="of the JPEG files (default: 75)")
    o = parser.parse_args(list(argv))
    for note in make_static_views(o.data, o.savedir, o.aug, o.images_per_class, o.seed, o.workers, o.quality):
        print(note)
    print(f"{o.savedir}: {sum(1 for _ in Path(o.savedir).glob('*/*-0.jpeg')):,} images with {count_views(o.aug)} views")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
