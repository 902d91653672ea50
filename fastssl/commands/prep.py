"""`fastssl prep`: converts images to files that load fast, and checks such files. The work is done by data_prep/."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from fastssl.command import USAGE, refuse_word, tidy_on_signals, usage
from fastssl.data_prep.describe import describe
from fastssl.data_prep.manifest import Tally
from fastssl.data_prep.prepare import Store
from fastssl.data_prep.sources import Selection
from fastssl.data_prep.subset import make_subset
from fastssl.data_prep.verify import verify
from fastssl.data_prep.work_pool import Work
from fastssl.data_prep.write_beton import write_beton
from fastssl.data_prep.write_shards import write_shards
from fastssl.plural import counted

_MOST_NAMED = 10  # images left out that are named on the terminal
Data = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
Out = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]


@dataclass(frozen=True)
class Beton:
    """Convert images to one .beton file, for the beton and resident loaders and for FFCV.

    fastssl prep beton imagenet train.beton   (short side 256, JPEG quality 90: 38 GB for ImageNet)

    fastssl prep beton imagenet train.beton --originals   (the files as they are: 140 GB, as fast as the disk)

    fastssl prep beton imagenet train.beton --raw   (pixels, which need no decoding: 333 GB)

    fastssl prep beton imagenet train.beton --classes imagenet100
    """

    data: Data
    """A folder with train/<class>/*, <class>/* or images, a tar file of one, a folder of shards, or ImageNet's tar."""
    out: Out
    """The file to write, beside OUT.json (counts, options, checksums) and OUT.images.jsonl (one line per image)."""
    store: Store = field(default_factory=Store)
    selection: Selection = field(default_factory=Selection)
    work: Work = field(default_factory=Work)
    force: bool = False
    """Replace OUT if it exists."""

    def run(self) -> int:
        """Converts and prints a summary. Raises ValueError for a file name that the loaders would not recognise."""
        if not self.out.endswith(".beton"):
            raise ValueError(f"{self.out} must end in .beton, or the loaders do not recognise it: {self.out}.beton")
        start = time.monotonic()
        tally = write_beton(self.data, self.out, self.store, self.selection, self.work, self.force)
        print_summary(tally, self.out, time.monotonic() - start)
        return 0


@dataclass(frozen=True)
class Shards:
    """Convert images to a folder of WebDataset tar files, each with an index file for DALI.

    fastssl prep shards imagenet shards/train --shard-size 512
    """

    data: Data
    """A folder with train/<class>/*, <class>/* or images, a tar file of one, a folder of shards, or ImageNet's tar."""
    out: Out
    """The folder to write, with shard-000000.tar, shard-000000.idx and so on, manifest.json and images.jsonl."""
    store: Store = field(default_factory=Store)
    selection: Selection = field(default_factory=Selection)
    work: Work = field(default_factory=Work)
    shard_size: int = 512
    """Largest size of a shard, in millions of bytes."""
    force: bool = False
    """Replace OUT if it is a folder of shards."""

    def run(self) -> int:
        """Converts and prints a summary."""
        start = time.monotonic()
        tally = write_shards(self.data, self.out, self.store, self.selection, self.work, self.shard_size, self.force)
        print_summary(tally, self.out, time.monotonic() - start)
        return 0


@dataclass(frozen=True)
class Subset:
    """Make a data set with some of another's classes out of links, without copying an image.

    fastssl prep subset imagenet imagenet-100   (the 100 classes that papers call ImageNet-100)

    fastssl prep subset imagenet imagenet-dogs --classes dogs.txt
    """

    data: Data
    """A folder with train/<class>/ (and val/<class>/), or with <class>/ folders."""
    out: Out
    """The folder for the links."""
    classes: Annotated[str, tyro.conf.arg(aliases=("-s", "--subset"))] = "imagenet100"
    """A file with one class per line, names separated by commas, or imagenet100."""
    force: Annotated[bool, tyro.conf.arg(aliases=("-f",))] = False
    """Replace the links of an earlier subset."""

    def run(self) -> int:
        """Links the classes and prints how many each split has."""
        for split, number in make_subset(self.data, self.out, self.classes, self.force).items():
            folder = f"{self.out}/{split}" if split else self.out
            print(f"{folder}: {counted(number, 'class', 'classes')}")
        return 0


@dataclass(frozen=True)
class Verify:
    """Check that a .beton file or a folder of shards is complete and undamaged; exits with 1 if it is not."""

    data: Data
    """The file, or the folder of shards. Files of other programs have no checksums: only their tables are checked."""
    decode: bool = False
    """Also decode every image of a .beton file."""
    workers: int | None = None
    """Number of threads or processes; by default one per core."""

    def run(self) -> int:
        """Checks, and prints what was checked."""
        print(verify(self.data, self.decode, self.workers))
        return 0


@dataclass(frozen=True)
class Describe:
    """Print what a .beton file (also one of FFCV's) or a folder of shards holds: counts, classes, sizes, options."""

    data: Data
    """The file, or the folder of shards."""

    def run(self) -> int:
        """Prints the description."""
        print(describe(self.data))
        return 0


VIEWS = "views"  # takes the small-model project's own flags
COMMANDS = {"beton": Beton, "shards": Shards, "subset": Subset, "verify": Verify, "describe": Describe}


def print_summary(tally: Tally, out: str, seconds: float) -> None:
    """Prints one line about what was written, and the images that were left out."""
    left_out = tally.quarantined
    speed = (tally.num_images + len(left_out)) / seconds
    images = counted(tally.num_images, "image") + ("" if tally.has_classes else " without classes")
    print(f"{out}: {images}, {tally.bytes:,} bytes, {speed:,.0f} images/s")
    for notice in tally.notices:
        print(f"{out}: {notice}", file=sys.stderr)
    for image in left_out[:_MOST_NAMED]:
        print(f"left out: {image['path']}: {image['reason']}", file=sys.stderr)
    if len(left_out) > _MOST_NAMED:
        print(f"left out: {len(left_out) - _MOST_NAMED:,} more; the manifest lists all of them", file=sys.stderr)


def main(argv: Sequence[str]) -> int:
    """`fastssl prep`."""
    name, *rest = argv or [""]
    if name in ("", "-h", "--help", "help"):
        texts = {name: command.__doc__.splitlines()[0] for name, command in COMMANDS.items()}
        texts[VIEWS] = "Write images beside fixed augmented views of them, for fastssl eval instdisc and stats."
        about = "Convert images to files that load fast, and check or describe such files."
        end = "Run fastssl prep COMMAND --help for the options of a command."
        print(usage("fastssl prep COMMAND ...", about, texts, end))
        return 0 if name else USAGE
    if name == VIEWS:
        from fastssl.data_prep import static_views  # imports torchvision, which takes seconds

        return static_views.main(rest)
    if name not in COMMANDS:
        return refuse_word("prep command", name, [*COMMANDS, VIEWS])
    flat = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    command = tyro.cli(COMMANDS[name], prog=f"fastssl prep {name}", args=rest, config=flat)
    with tidy_on_signals():
        return command.run()
