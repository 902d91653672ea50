"""How loops are compiled for a CPU: by numba, kept on disk, without the GIL, so that threads can share the work."""

from __future__ import annotations

from collections.abc import Callable

from numba import njit


def compiled(function: Callable | None = None, *, inline: bool = False, **options: object) -> Callable:
    """A decorator: `function` as machine code, compiled at its first call; divisions by zero give infinity.

    inline: its lines are put into its callers before they are compiled. options: numba's.
    """

    def compile_with(function: Callable) -> Callable:
        chosen = {"nogil": True, "error_model": "numpy", "inline": "always" if inline else "never"} | options
        try:
            return njit(function, cache=True, **chosen)
        except RuntimeError:  # nowhere to keep the compiled code: every start takes some seconds longer
            return njit(function, **chosen)

    return compile_with if function is None else compile_with(function)
