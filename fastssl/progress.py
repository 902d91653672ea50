"""A progress bar on stderr, where that is a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from tqdm import tqdm


class Progress(tqdm):
    """tqdm's bar as wide as the terminal; `shown=False`, for all ranks but one, hides it."""

    disable = True  # until the constructor says otherwise: a bar whose constructor a signal ended goes in silence

    def __init__(self, items: Iterable | None = None, *, shown: bool = True, **options: object) -> None:
        super().__init__(items, dynamic_ncols=True, disable=None if shown else True, **options)
