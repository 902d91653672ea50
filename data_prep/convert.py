"""Prepares the images of a source, in order, for every file format; images that cannot be used are left out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial

from tqdm import tqdm

from fastssl.data_prep.decode import BadImage
from fastssl.data_prep.jpeg import NotPlain
from fastssl.data_prep.manifest import Tally
from fastssl.data_prep.prepare import Prepared, Store, pass_image, prepare_image
from fastssl.data_prep.sources import Place, Source, read_place
from fastssl.data_prep.work_pool import Died, Ticket, Work, WorkPool, ahead

_CHUNK = 16  # images per task: enough to make the cost of handing out tasks negligible
_DIED = "the process that decoded it died, twice"

Outcome = Prepared | BadImage


def prepare_place(place: Place, store: Store) -> Outcome:
    """Reads and prepares one image; for one that cannot be used, returns the BadImage instead of raising it."""
    try:
        return prepare_image(read_place(place), place.name, store)
    except BadImage as error:
        return error


def pass_place(place: Place) -> Outcome | None:
    """Reads one image to store it as it is; None if it has to be decoded."""
    try:
        return pass_image(read_place(place))
    except NotPlain:
        return None
    except BadImage as error:
        return error


def prepared_images(source: Source, store: Store, work: Work, tally: Tally) -> Iterator[tuple[Prepared, int]]:
    """The usable images of the source with their labels; counts all in `tally` and shows a progress bar.

    Raises ValueError when no image can be used, and with on_error="stop" at the first that cannot.
    """
    bar = tqdm(total=len(source), unit="images", dynamic_ncols=True, disable=None, smoothing=0.1)
    with bar, closing(convert(source, store, work.processes)) as outcomes:
        for label, (place, outcome) in zip(source.folder.labels.tolist(), outcomes):
            if not isinstance(outcome, BadImage):
                tally.add(place, outcome, label)
                yield outcome, label
            elif work.on_error == "stop":
                raise ValueError(f"cannot use {outcome}; repair or remove it, or use --on-error quarantine")
            else:
                tally.leave_out(outcome)
                bar.set_postfix(left_out=len(tally.quarantined))
            bar.update()
    if not tally.num_images:
        first = tally.quarantined[0]
        raise ValueError(
            f"no image can be used ({len(source):,} tried), the first is {first['path']}: {first['reason']}"
        )


def convert(source: Source, store: Store, workers: int) -> Iterator[tuple[Place, Outcome]]:
    """The outcome of every image of the source, in its order.

    Threads read files that may be stored as they are, which is work for the disk; processes decode the others.
    """
    depth = 2 * workers + 1
    pool = WorkPool(partial(prepare_place, store=store), workers)
    with closing(pool), ThreadPoolExecutor(workers, thread_name_prefix="fastssl-read") as readers:

        def begin(places: list[Place]) -> tuple[list[Place], Future | None]:
            read = readers.submit(lambda: [pass_place(place) for place in places]) if store.passes else None
            return places, read

        def decode(places: list[Place], read: Future | None) -> tuple[list[Place], list[Outcome | None], Ticket]:
            passed = read.result() if read else [None] * len(places)
            return places, passed, pool.submit([place for place, outcome in zip(places, passed) if outcome is None])

        begun = ahead(map(begin, chunks(source)), depth if store.passes else 0)
        for places, passed, ticket in ahead(itertools.starmap(decode, begun), depth):
            decoded = iter(pool.results(ticket))
            for place, outcome in zip(places, passed):
                if outcome is None:
                    outcome = next(decoded)
                if isinstance(outcome, Died):
                    outcome = BadImage(place.name, _DIED)
                yield place, outcome


def chunks(source: Source) -> Iterator[list[Place]]:
    """The places of the source's images, _CHUNK at a time."""
    for first in range(0, len(source), _CHUNK):
        yield [source.place(i) for i in range(first, min(first + _CHUNK, len(source)))]
