"""`fastssl prep views`: writes images beside fixed views of them, for instance discrimination and statistics.

    <out>/<class>/<stem>-0.jpeg    the image
    <out>/<class>/<stem>-1.jpeg    its views: -1 and -2, and masked ones up to -10 (see view_pairs.py)
    <out>.json                     the options

Names and layout are those of the small-model project (arXiv 2107.14762), whose scripts can read the result. It differs
in that the images (the first of each class by name) and all random choices are a function of --seed.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

from fastssl.command import run_command, tidy_on_signals
from fastssl.data_prep.decode import BadImage, decode_image
from fastssl.data_prep.files import write_text, written_whole
from fastssl.data_prep.find import ImageFolder, find_images
from fastssl.data_prep.view_pairs import AUGS, count_views, make_view_pair
from fastssl.data_prep.work_pool import Died, WorkPool, ahead
from fastssl.machine.limits import usable_cores
from fastssl.plural import counted

_CHUNK = 4  # images per task


class Job(NamedTuple):
    """One image to draw views of."""

    source: str
    target: str  # <out>/<class>/<stem>, without -0.jpeg
    aug: str
    seed: int
    quality: int


class Outcome(NamedTuple):
    """The result of a job."""

    error: str  # why nothing was written, or ""
    in_band: bool  # whether the crops overlap as much as `aug` wants


def make_static_views(
    data: str, out: str, aug: str = "moco", images_per_class: int = 50, seed: int = 0, workers: int | None = None,
    quality: int = 75,
) -> list[str]:  # fmt: skip
    """Writes the view set of the images in `data`/<class>/ and returns notes for the user.

    An unfinished set with the same options is completed. An image that cannot be read is named in the notes, and the
    next one of its class takes its place.
    Raises ValueError for a flat folder, when no image can be read, for two images in a class with the same stem, and
    for an `out` that was made with other options or is inside `data`.
    """
    if images_per_class < 1 or (workers is not None and workers < 1):
        raise ValueError("--images-per-class and --workers must be at least 1")
    if not 1 <= quality <= 95:
        raise ValueError(f"--quality must be from 1 to 95, got {quality}")
    folder = find_images(data)
    if not folder.class_names:
        raise ValueError(f"{data} holds images without classes: a view set needs <class>/ folders")
    if Path(out).resolve().is_relative_to(Path(folder.root).resolve()):
        raise ValueError(f"{out} is inside {folder.root}, and the views would become images of it: choose another")
    options = {"aug": aug, "seed": seed, "quality": quality}  # not the number of images: more may be added later
    queues = {name: iter(jobs) for name, jobs in _jobs(folder, out, options).items()}
    _claim(Path(out), options)
    wanted = dict.fromkeys(queues, images_per_class)
    notes: list[str] = []
    written = out_of_band = 0
    while jobs := [(name, job) for name, count in wanted.items() for job in itertools.islice(queues[name], count)]:
        wanted = dict.fromkeys(queues, 0)
        outcomes = _run([job for _, job in jobs], workers)
        for (name, _), outcome in zip(jobs, tqdm(outcomes, total=len(jobs), unit="image", disable=None)):
            if outcome.error:
                notes.append(f"left out: {outcome.error}")
                wanted[name] += 1
            else:
                written += 1
            if not outcome.in_band:
                out_of_band += 1
    if not written:
        first = notes[0].removeprefix("left out: ")
        raise ValueError(f"no image can be used ({len(notes):,} tried), the first is {first}")
    if out_of_band:
        images = counted(out_of_band, "image")
        notes.append(f"{images}: no two crops found with the overlap of --aug {aug}, so the last two tried were used")
    return [*folder.notices, *notes]


def _claim(out: Path, options: dict) -> None:
    """Writes `out`.json; raises ValueError when it exists with other options, or `out` belongs to something else."""
    manifest = Path(os.path.abspath(out) + ".json")  # absolute, because "." has no name
    out.mkdir(parents=True, exist_ok=True)
    if manifest.exists():
        try:
            made = json.loads(manifest.read_text())
        except ValueError:
            made = None
        if not isinstance(made, dict) or not options.keys() <= made.keys():
            raise ValueError(f"{manifest} holds no options of a view set: move it away, or name another folder")
        if wrong := [key for key in options if made[key] != options[key]]:
            flags = " ".join(f"--{key.replace('_', '-')} {made[key]}" for key in wrong)
            raise ValueError(f"{out} was made with {flags}: use the same, or choose another folder")
        return
    if any(out.iterdir()):
        raise ValueError(f"{out} is not empty and there is no {manifest.name} beside it: choose an empty folder")
    write_text(manifest, json.dumps(options, indent=1) + "\n")


def _jobs(folder: ImageFolder, out: str, options: dict) -> dict[str, list[Job]]:
    """A job for every image, by class, in the order of their names; the stem is the name up to the first dot."""
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


def _run(jobs: Sequence[Job], workers: int | None) -> Iterator[Outcome]:
    """Outcomes in the order of the jobs. An image that kills the process decoding it counts as unreadable."""
    workers = min(workers or usable_cores(), len(jobs))
    if workers == 1:
        yield from map(draw, jobs)
        return
    with closing(WorkPool(draw, workers)) as pool:
        begun = (pool.submit(jobs[i : i + _CHUNK]) for i in range(0, len(jobs), _CHUNK))
        for ticket in ahead(begun, 2 * workers):
            for job, outcome in zip(ticket.items, pool.results(ticket)):
                if isinstance(outcome, Died):
                    outcome = Outcome(f"{job.source}: its decoder crashes", True)
                yield outcome


def draw(job: Job) -> Outcome:
    """Writes one image and its views, each file whole or not at all; if the last one exists, so do the others."""
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
        with written_whole(Path(f"{job.target}-{number}.jpeg")) as partial:
            view.save(partial, format="JPEG", quality=job.quality)
    return Outcome("", in_band)


def main(argv: Sequence[str]) -> int:
    """`fastssl prep views`."""
    parser = argparse.ArgumentParser(
        "fastssl prep views",
        description="Write images beside fixed augmented views of them, for fastssl eval instdisc and stats.",
        allow_abbrev=False,
    )
    parser.add_argument("data", help="a folder with <class>/ folders of images")
    parser.add_argument("savedir", help="the folder for <class>/<stem>-{0,1,2,...}.jpeg")
    parser.add_argument("--aug", default="moco", choices=AUGS, help="how the two crops are drawn (default: moco)")
    parser.add_argument("--images-per-class", type=int, default=50, metavar="N", help="images per class (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random choices (default: 0)")
    parser.add_argument("--workers", type=int, help="number of processes (default: one per core)")
    parser.add_argument("--quality", type=int, default=75, help="quality of the JPEG files (default: 75)")
    o = parser.parse_args(list(argv))
    with tidy_on_signals():
        notes = make_static_views(o.data, o.savedir, o.aug, o.images_per_class, o.seed, o.workers, o.quality)
    for note in notes:
        print(note)
    images = counted(len(list(Path(o.savedir).glob("*/*-0.jpeg"))), "image")
    print(f"{o.savedir}: {images} with {count_views(o.aug)} views each")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
