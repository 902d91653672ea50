"""Refuses ranks that were started differently or see other images: they would train on a mixture, or wait for ever."""

from __future__ import annotations

from fastssl.config import Config, flat
from fastssl.config_checks import flag_of
from fastssl.distributed import Ranks, gather_objects
from fastssl.loaders.make import Loader
from fastssl.machine.precision import choose_precision
from fastssl.plural import counted

OWN = ("data", "val", "output", "workers", "read_ahead", "beton_cache")  # options that may be a node's own


def check_options(config: Config, ranks: Ranks) -> None:
    """Raises ValueError, on every rank alike, unless all ranks have the same options. Call on all ranks."""
    mine = {name: value for name, value in flat(config).items() if name not in OWN}
    mine["precision"] = choose_precision(config.train.precision, ranks.device)  # auto means another on other hardware
    first, *others = gather_objects(mine, ranks)
    for rank, options in enumerate(others, 1):
        for name, value in first.items():
            if options.get(name) != value:
                difference = f"{flag_of(name)} is {value} on rank 0 but {options.get(name)} on rank {rank}"
                raise ValueError(f"{difference}: give all ranks the same")


def check_images(loader: Loader | None, kind: str, ranks: Ranks) -> None:
    """Raises ValueError, on every rank alike, unless all ranks see as many images of the same classes.

    loader: of the images that the sentence calls `kind`, or None without any; an evaluation's `Images` will do as well.
    Call on all ranks.
    """
    seen = gather_objects((loader.num_images, loader.class_names) if loader else (0, []), ranks)
    first, first_classes = seen[0]
    for rank, (images, classes) in enumerate(seen):
        if images != first:
            count = f"{counted(first, f'{kind} image')} and rank {rank} {images:,}"
            raise ValueError(f"rank 0 sees {count}: give all ranks the same data")
        if classes != first_classes:
            raise ValueError(
                f"rank {rank} sees {kind} images of other classes than rank 0: give all ranks the same data"
            )
