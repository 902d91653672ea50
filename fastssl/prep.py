"""`fastssl prep`: from image files to the files that train fast. Each subcommand's work lies in data_prep/."""

from __future__ import annotations

import difflib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from fastssl.command import USAGE, tidy_on_signals
from fastssl.data_prep.describe import describe
from fastssl.data_prep.manifest import Tally
from fastssl.data_prep.prepare import Store
from fastssl.data_prep.sources import Selection
from fastssl.data_prep.subset import make_subset
from fastssl.data_prep.verify import verify
from fastssl.data_prep.work_pool import Work
from fastssl.data_prep.write_beton import write_beton
from fastssl.data_prep.write_shards import write_shards

_MOST_NAMED = 10  # images left out that are named on the terminal
Positional = tyro.conf.Positional


@dataclass(frozen=True)
class Beton:
    """Convert images to one .beton file, which FFCV and the beton and resident loaders read.

    fastssl prep beton imagenet train.beton   (short side 256, JPEG quality 90: 38 GB for ImageNet)

    fastssl prep beton imagenet train.beton --originals   (the files' own bytes: 140 GB, done as fast as the disk)

    fastssl prep beton imagenet train.beton --raw   (pixels, no decoding when training: 333 GB)

    fastssl prep beton imagenet train.beton --classes imagenet100
    """

    data: Positional[str]
    """Folder with train/<class>/*, <class>/* or images; or a tar file of such, WebDataset shards, a folder of tars."""
    out: Positional[str]
    """The file to write; OUT.json (counts, options, checksums) and OUT.images.jsonl (a line an image) lie beside it."""
    store: Store = field(default_factory=Store)
    selection: Selection = field(default_factory=Selection)
    work: Work = field(default_factory=Work)
    force: bool = False
    """Replace OUT if it exists."""

    def run(self) -> int:
        """Converts and says what came of it. Raises ValueError for a name that no loader would know again."""
        if not self.out.endswith(".beton"):
            raise ValueError(f"OUT must end in .beton, by which the loaders know the file: {self.out}.beton")
        start = time.monotonic()
        tally = write_beton(self.data, self.out, self.store, self.selection, self.work, self.force)
        return say(tally, self.out, time.monotonic() - start)


@dataclass(frozen=True)
class Shards:
    """Convert images to a folder of WebDataset tar files, each with the index file that DALI's reader wants.

    fastssl prep shards imagenet shards/train --shard-size 512
    """

    data: Positional[str]
    """Folder with train/<class>/*, <class>/* or images; or a tar file of such, WebDataset shards, a folder of tars."""
    out: Positional[str]
    """The folder to write: shard-000000.tar and .idx and so on, manifest.json, images.jsonl."""
    store: Store = field(default_factory=Store)
    selection: Selection = field(default_factory=Selection)
    work: Work = field(default_factory=Work)
    shard_size: int = 512
    """Million bytes a shard holds at most."""
    force: bool = False
    """Replace OUT if it is a folder of shards."""

    def run(self) -> int:
        """Converts and says what came of it."""
        start = time.monotonic()
        arguments = (self.store, self.selection, self.work, self.shard_size, self.force)
        tally = write_shards(self.data, self.out, *arguments)
        return say(tally, self.out, time.monotonic() - start)


@dataclass(frozen=True)
class Subset:
    """Make a data set of some classes of another one, as links: no image is copied.

    fastssl prep subset imagenet imagenet-100   (the 100 classes that papers call ImageNet-100)

    fastssl prep subset imagenet imagenet-dogs --classes dogs.txt
    """

    data: Positional[str]
    """Folder with train/<class>/ (and val/<class>/), or with <class>/ folders."""
    out: Positional[str]
    """Folder for the links."""
    classes: Annotated[str, tyro.conf.arg(aliases=("-s", "--subset"))] = "imagenet100"
    """A file with a class a line, names with commas between them, or imagenet100."""
    force: Annotated[bool, tyro.conf.arg(aliases=("-f",))] = False
    """Replace the links of an earlier subset."""

    def run(self) -> int:
        """Links the classes and counts them."""
        for split, count in make_subset(self.data, self.out, self.classes, self.force).items():
            print(f"{self.out}{'/' * bool(split)}{split}: {count:,} classes")
        return 0


@dataclass(frozen=True)
class Verify:
    """Check a .beton file or a folder of shards: whole, and every bit as it was written. Exit code 1 if not."""

    data: Positional[str]
    """The file, or the folder of shards. A beton made by another program has no checksums: its tables are checked."""
    decode: bool = False
    """Decode every image of a beton too."""
    workers: int | None = None
    """Threads and processes; by default one for each core."""

    def run(self) -> int:
        """Checks and says what was checked."""
        print(verify(self.data, self.decode, self.workers))
        return 0


@dataclass(frozen=True)
class Describe:
    """Print what a .beton file or a folder of shards holds: counts, classes, sizes, options. Also of FFCV's betons."""

    data: Positional[str]
    """The file, or the folder of shards."""

    def run(self) -> int:
        """Prints it."""
        print(describe(self.data))
        return 0


VIEWS = "views"  # takes the small-model project's own flags
COMMANDS = {"beton": Beton, "shards": Shards, "subset": Subset, "verify": Verify, "describe": Describe}


def say(tally: Tally, out: str, seconds: float) -> int:
    """One line on what was written, some on what was left out."""
    count, left_out = tally.num_images, tally.quarantined
    print(f"{out}: {count:,} images, {tally.bytes:,} bytes, {(count + len(left_out)) / seconds:,.0f} images/s")
    for image in left_out[:_MOST_NAMED]:
        print(f"left out: {image['path']}: {image['reason']}", file=sys.stderr)
    if len(left_out) > _MOST_NAMED:
        print(f"left out: {len(left_out) - _MOST_NAMED:,} more, all in the manifest", file=sys.stderr)
    return 0


def usage() -> str:
    """What `fastssl prep --help` prints."""
    texts = {name: kind.__doc__.splitlines()[0] for name, kind in COMMANDS.items()}
    texts[VIEWS] = "Write each image beside augmented views that never change, for fastssl eval instdisc and stats."
    width = max(map(len, texts))
    lines = [f"  {name:{width}}  {text}" for name, text in texts.items()]
    return "\n".join(
        [
            "usage: fastssl prep COMMAND ...",
            "",
            "Prepare images once, train many times: each file is checked, made smaller and put where reading is fast.",
            "",
            *lines,
            "",
            "fastssl prep COMMAND --help explains a command and its options.",
        ]
    )


def main(argv: Sequence[str]) -> int:
    """`fastssl prep`."""
    name, *rest = argv or [""]
    if name in ("", "-h", "--help", "help"):
        print(usage())
        return 0 if name else USAGE
    if name == VIEWS:
        from fastssl.data_prep import static_views  # here: only it needs torchvision, whose import takes seconds

        return static_views.main(rest)
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, [*COMMANDS, VIEWS], n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join([*COMMANDS, VIEWS])}"
        print(f"fastssl prep: error: no command {name!r}; {hint}", file=sys.stderr)
        return USAGE
    flat = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    command = tyro.cli(COMMANDS[name], prog=f"fastssl prep {name}", args=rest, config=flat)
    with tidy_on_signals():
        return command.run()
