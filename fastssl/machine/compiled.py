"""Compiles loops for the CPU with numba: cached on disk, and without the GIL, so that threads can share the work."""

from __future__ import annotations

from collections.abc import Callable


def numba_obstacle() -> str | None:
    """Why loops cannot be compiled here, in a few words, or None."""
    try:
        import numba  # noqa: F401 (a second on its first import)
    except ModuleNotFoundError as error:
        return "numba is not installed: pip install numba" if error.name == "numba" else f"numba lacks {error.name}"
    except ImportError as error:  # for example because NumPy is too new for it
        return f"numba does not load: {' '.join(str(error).split())}"
    return None


def compiled(function: Callable | None = None, *, inline: bool = False, **options: object) -> Callable:
    """A decorator that compiles `function` at its first call; division by zero gives infinity.

    inline: the function is inlined into its callers. options: numba's own. The cache on disk notices only changes of
    the function's own file, so a compiled loop should not call one of another file.
    Raises ImportError without numba.
    """
    from numba import njit

    def compile_with(function: Callable) -> Callable:
        chosen = {"nogil": True, "error_model": "numpy", "inline": "always" if inline else "never"} | options
        try:
            return njit(function, cache=True, **chosen)
        except RuntimeError:  # no folder to cache in: every start takes some seconds longer
            return njit(function, **chosen)

    return compile_with if function is None else compile_with(function)
