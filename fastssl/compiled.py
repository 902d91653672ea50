"""How loops are compiled for a CPU: by numba, kept on disk, without the GIL, so that threads can share the work."""

from __future__ import annotations

from collections.abc import Callable


def numba_obstacle() -> str | None:
    """What keeps loops from being compiled here, in a few words, or None."""
    try:
        import numba  # noqa: F401 (a second on its first import)
    except ModuleNotFoundError as error:
        return "numba is not installed: pip install numba" if error.name == "numba" else f"numba lacks {error.name}"
    except ImportError as error:  # NumPy is too new for it, for one
        return f"numba does not load: {' '.join(str(error).split())}"
    return None


def compiled(function: Callable | None = None, *, inline: bool = False, **options: object) -> Callable:
    """A decorator: `function` as machine code, compiled at its first call; divisions by zero give infinity.

    inline: its lines are put into its callers before they are compiled. options: numba's. What is kept on disk is
    compiled anew when its own file changes: a loop should call no loop of another file.
    Raises ImportError without numba.
    """
    from numba import njit

    def compile_with(function: Callable) -> Callable:
        chosen = {"nogil": True, "error_model": "numpy", "inline": "always" if inline else "never"} | options
        try:
            return njit(function, cache=True, **chosen)
        except RuntimeError:  # nowhere to keep the compiled code: every start takes some seconds longer
            return njit(function, **chosen)

    return compile_with if function is None else compile_with(function)
