"""A source's images in order, each prepared or named as unusable: what every file format is written from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial

from tqdm import tqdm

from fastssl.data_prep.images import BadImage
from fastssl.data_prep.jpeg import NotPlain
from fastssl.data_prep.manifest import Tally
from fastssl.data_prep.prepare import Prepared, Store, pass_image, prepare_image
from fastssl.data_prep.sources import Place, Source, read_place
from fastssl.data_prep.work_pool import Died, Ticket, Work, WorkPool, ahead

_CHUNK = 16  # images handed out at once: handing out then costs nothing
_DIED = "the process that decoded it died twice, alone with it"

Outcome = Prepared | BadImage


def prepare_place(place: Place, store: Store) -> Outcome:
    """Reads and prepares one image; one that cannot be used is the result, not an exception."""
    try:
        return prepare_image(read_place(place), place.name, store)
    except BadImage as error:
        return error


def pass_place(place: Place) -> Outcome | None:
    """Reads one image and passes it through as it is; None when it has to be decoded."""
    try:
        return pass_image(read_place(place))
    except NotPlain:
        return None
    except BadImage as error:
        return error


def converted(source: Source, store: Store, work: Work, tally: Tally) -> Iterator[tuple[Prepared, int]]:
    """The images of the source that can be used, with their labels, counted in `tally` behind a progress bar."""
    bar = tqdm(total=len(source), unit="images", dynamic_ncols=True, disable=None, smoothing=0.1)
    with bar, closing(convert(source, store, work.processes)) as outcomes:
        for label, (place, outcome) in zip(source.folder.labels.tolist(), outcomes):
            if not isinstance(outcome, BadImage):
                tally.add(place, outcome, label)
                yield outcome, label
            elif work.on_error == "stop":
                raise ValueError(
                    f"cannot use {outcome}; mend or remove it, or let --on-error quarantine leave such images out"
                )
            else:
                tally.leave_out(outcome)
                bar.set_postfix(left_out=len(tally.quarantined))
            bar.update()
    if not tally.num_images:
        first = tally.quarantined[0]
        raise ValueError(f"none of the {len(source)} images can be used; {first['path']}: {first['reason']}")


def convert(source: Source, store: Store, workers: int) -> Iterator[tuple[Place, Outcome]]:
    """Every image of the source, in its order.

    Originals are only read and looked at, by threads: that is the disk's work. Decoding is done by processes.
    """
    depth = 2 * workers + 1
    pool = WorkPool(partial(prepare_place, store=store), workers)
    with closing(pool), ThreadPoolExecutor(workers, thread_name_prefix="fastssl-read") as readers:

        def begin(places: list[Place]) -> Iterator[tuple]:
            read = readers.submit(lambda: [pass_place(place) for place in places]) if store.passes else None
            return places, read

        def decode(places: list[Place], read) -> tuple[list[Place], list[Outcome | None], Ticket]:
            passed = read.result() if read else [None] * len(places)
            return places, passed, pool.submit([place for place, outcome in zip(places, passed) if outcome is None])

        begun = ahead(map(begin, chunks(source)), depth if store.passes else 0)
        for places, passed, ticket in ahead(itertools.starmap(decode, begun), depth):
            decoded = iter(pool.results(ticket))
            for place, outcome in zip(places, passed):
                outcome = next(decoded) if outcome is None else outcome
                yield place, BadImage(place.name, _DIED) if isinstance(outcome, Died) else outcome


def chunks(source: Source) -> Iterator[list[Place]]:
    """Where the images lie, some at a time."""
    for first in range(0, len(source), _CHUNK):
        yield [source.place(i) for i in range(first, min(first + _CHUNK, len(source)))]
