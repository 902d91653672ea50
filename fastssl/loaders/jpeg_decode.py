"""JPEGs and raw pixels of a .beton file decoded by libffcv's libjpeg-turbo, in compiled loops that do not hold the GIL.

libffcv's own `imdecode` hides why it failed, scales an image whose size is not the stated one, and always takes the
fast, inexact IDCT. So the functions it is linked to are called instead. They are bound by name, which lets numba keep
the compiled loop on disk (FFCV binds addresses and compiles at every start), and ffcv is not imported, which would
take seconds and set torch to one thread.
"""

from __future__ import annotations

import glob
import importlib.util
import os
from collections.abc import Callable

import llvmlite.binding as llvm
import numpy as np
from numba import njit
from numba.core.types import ExternalFunction, int32, intp, void

GOOD, WARNING, FATAL, WRONG_SIZE = range(4)  # of an image, after decoding
_MESSAGE = 200  # bytes of libjpeg's longest message
_RGB = 0  # TJPF_RGB
_ACCURATE = 4096  # TJFLAG_ACCURATEDCT, as Pillow's; the fast one is off by a grey level in the mean and saves 2 %
# All rows are there by then: some cameras and tools pad the data before the end-of-image marker
_HARMLESS = ("extraneous bytes before marker 0xd9",)

_SYMBOLS = {
    "tjInitDecompress": intp(),
    "tjDestroy": int32(intp),
    "tjDecompressHeader3": int32(intp, intp, intp, intp, intp, intp, intp),
    "tjDecompress2": int32(intp, intp, intp, intp, int32, int32, int32, int32, int32),
    "tjGetErrorCode": int32(intp),
    "tjGetErrorStr2": intp(intp),
    "strncpy": intp(intp, intp, intp),
    "my_memcpy": void(intp, intp, intp),
}


def _load_libffcv() -> None:
    """Makes libffcv's functions known to compiled code; raises ImportError where that cannot be."""
    spec = importlib.util.find_spec("ffcv")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("ffcv is not installed")
    found = glob.glob(os.path.join(spec.submodule_search_locations[0], "_libffcv*.so"))
    try:
        llvm.load_library_permanently(found[0])
    except (IndexError, RuntimeError) as error:
        raise ImportError(f"libffcv cannot be loaded: {error}") from error
    if missing := [name for name in _SYMBOLS if llvm.address_of_symbol(name) is None]:
        raise ImportError(f"libffcv comes without {missing[0]}")


_load_libffcv()
_init, _destroy, _header, _decompress, _code, _text, _strncpy, _memcpy = (
    ExternalFunction(name, signature) for name, signature in _SYMBOLS.items()
)


def _compile(function: Callable) -> Callable:
    """The function compiled, and kept on disk for the next start."""
    try:
        return njit(function, cache=True, nogil=True)
    except RuntimeError:  # neither this folder nor the user's cache can be written: every start takes a second longer
        return njit(function, nogil=True)


@_compile
def _decode_stored(data, pointer, size, raw, height, width, pixels, offset, status, found, message):
    """The loop of `decode_stored_images`; data and pixels are addresses.

    Writes status (n,) uint8, found (n, 4) int32 (the JPEG's own width, height, subsampling and colours) and message
    (n, 200) uint8 (libjpeg's, after a WARNING or FATAL).
    """
    decoder = _init()
    for i in range(len(pointer)):
        source, target = data + pointer[i], pixels + offset[i]
        status[i] = GOOD
        if raw[i]:
            _memcpy(source, target, size[i])
            continue
        own = found.ctypes.data + i * 16
        failed = _header(decoder, source, size[i], own, own + 4, own + 8, own + 12)
        if failed == 0 and (found[i, 0] != width[i] or found[i, 1] != height[i]):
            status[i] = WRONG_SIZE
            continue
        if failed == 0:
            failed = _decompress(
                decoder, source, size[i], target, width[i], width[i] * 3, height[i], int32(_RGB), int32(_ACCURATE)
            )
        if failed != 0:
            status[i] = FATAL if _code(decoder) != 0 else WARNING
            _strncpy(message.ctypes.data + i * _MESSAGE, _text(decoder), _MESSAGE - 1)
    _destroy(decoder)


def decode_stored_images(
    data: np.ndarray,
    pointer: np.ndarray,
    size: np.ndarray,
    raw: np.ndarray,
    height: np.ndarray,
    width: np.ndarray,
    pixels: np.ndarray,
    offset: np.ndarray,
) -> dict[int, tuple[int, str]]:
    """Decodes n stored images, each once and whole, into `pixels` at `offset`; which cannot be used, and why.

    data, pixels: (bytes,) uint8, contiguous. pointer, size, offset: (n,) int64; raw: (n,) bool; height, width: (n,)
    int32. The caller has checked that they stay within `data` and `pixels`.
    Returns {i: (WARNING, FATAL or WRONG_SIZE, reason)}, empty when all are good; the windows of those may hold
    anything. What libjpeg-turbo warns of counts, since pixels are then missing or wrong, but for padding before the
    end of an image, which costs no pixel.
    """
    n = len(pointer)
    status, found = np.empty(n, np.uint8), np.zeros((n, 4), np.int32)
    message = np.zeros((n, _MESSAGE), np.uint8)
    stored = (data.ctypes.data, pointer, size, raw, height, width)
    _decode_stored(*stored, pixels.ctypes.data, offset, status, found, message)
    bad = {}
    for i in np.flatnonzero(status).tolist():
        text = message[i].tobytes().rstrip(b"\0").decode("ascii", "replace")
        if status[i] == WRONG_SIZE:
            text = f"the JPEG is {found[i, 0]} x {found[i, 1]}, the index says {width[i]} x {height[i]}"
        if status[i] != WARNING or not text.endswith(_HARMLESS):
            bad[i] = int(status[i]), text
    return bad
