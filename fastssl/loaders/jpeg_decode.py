"""Decodes JPEGs, and copies raw pixels, with libjpeg-turbo: many images per call, without the GIL.

There must be no Python between two images: a thread that needs the GIL while the training loop holds it waits up to
5 ms, ten times the time an image takes. So the loop is machine code, which llvmlite generates at import in 5 ms; the
same loop in numba took 0.4 s to load even from numba's cache. FFCV's own library is not used, because importing ffcv
takes seconds and sets torch to one thread, and its `imdecode` hides the reason of a failure, rescales an image whose
size is not the stated one, and always uses the fast, inexact IDCT.
"""

from __future__ import annotations

import ctypes
import ctypes.util

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir

GOOD, WARNING, FATAL, WRONG_SIZE = range(4)  # the result for an image
_MESSAGE = 200  # size of libjpeg's message buffer in bytes
_RGB = 0  # TJPF_RGB
_ACCURATE = 4096  # TJFLAG_ACCURATEDCT, as in Pillow; the fast IDCT is off by a grey level on average and saves 2 %
# All rows have been decoded by then: some cameras and tools pad the data before the end-of-image marker.
_HARMLESS = ("extraneous bytes before marker 0xd9",)

_STORED = np.dtype(  # an image's entry in the table of the compiled loop: input first, then results
    [
        ("source", "i8"),  # address of the stored bytes
        ("target", "i8"),  # address of the pixels
        ("size", "i8"),  # stored bytes
        ("width", "i4"),
        ("height", "i4"),
        ("raw", "i4"),
        ("status", "i4"),  # GOOD, WARNING or FATAL
        ("own_width", "i4"),  # as the JPEG's header says
        ("own_height", "i4"),
        ("subsampling", "i4"),
        ("colours", "i4"),
        ("message", f"S{_MESSAGE}"),  # libjpeg's, after a WARNING or FATAL
    ]
)

_ADDRESS, _INT = ir.IntType(64), ir.IntType(32)
_CALLS = {  # name: (result, arguments)
    "tjInitDecompress": (_ADDRESS, []),
    "tjDestroy": (_INT, [_ADDRESS]),
    "tjDecompressHeader3": (_INT, [_ADDRESS] * 7),
    "tjDecompress2": (_INT, [_ADDRESS] * 4 + [_INT] * 5),
    "tjGetErrorCode": (_INT, [_ADDRESS]),
    "tjGetErrorStr2": (_ADDRESS, [_ADDRESS]),
    "strncpy": (_ADDRESS, [_ADDRESS] * 3),
    "memcpy": (_ADDRESS, [_ADDRESS] * 3),
}


def _find_calls() -> None:
    """Tells LLVM the addresses of the functions in _CALLS. Raises ImportError if libturbojpeg is missing."""
    name = "libturbojpeg.so.0"
    try:
        turbojpeg = ctypes.CDLL(name)
    except OSError:
        name = ctypes.util.find_library("turbojpeg")
        if name is None:
            raise ImportError("libturbojpeg is not installed") from None
        turbojpeg = ctypes.CDLL(name)
    process = ctypes.CDLL(None)
    for call in _CALLS:
        function = getattr(turbojpeg if call.startswith("tj") else process, call, None)
        if function is None:
            raise ImportError(f"{name} has no function {call}")
        llvm.add_symbol(call, ctypes.cast(function, ctypes.c_void_p).value)


def _write_loop() -> ir.Module:
    """LLVM code of decode(first, end), which decodes an array of _STORED between these two addresses."""
    module = ir.Module()
    calls = {name: ir.Function(module, ir.FunctionType(*types), name) for name, types in _CALLS.items()}
    decode = ir.Function(module, ir.FunctionType(ir.VoidType(), [_ADDRESS, _ADDRESS]), "decode")
    first, end = decode.args
    start, each, done = (decode.append_basic_block(name) for name in ("start", "each", "done"))
    build = ir.IRBuilder(start)
    decoder = build.call(calls["tjInitDecompress"], [])
    build.branch(each)
    build.position_at_end(each)
    image = build.phi(_ADDRESS)
    image.add_incoming(first, start)
    _write_image(build, calls, decoder, image)
    following = build.add(image, _ADDRESS(_STORED.itemsize))
    image.add_incoming(following, build.block)
    build.cbranch(build.icmp_unsigned("<", following, end), each, done)
    build.position_at_end(done)
    build.call(calls["tjDestroy"], [decoder])
    build.ret_void()
    return module


def _write_image(build: ir.IRBuilder, calls: dict[str, ir.Function], decoder: ir.Value, image: ir.Value) -> None:
    """Writes the loop's body, for the entry at the address `image`."""

    def place(name: str) -> ir.Value:
        return build.add(image, _ADDRESS(_STORED.fields[name][1]))

    def pointer(name: str) -> ir.Value:
        kind = ir.IntType(8 * _STORED.fields[name][0].itemsize)
        return build.inttoptr(place(name), kind.as_pointer())

    def call(name: str, *arguments: ir.Value) -> ir.Value:
        return build.call(calls[name], arguments)

    source, target, size, width, height, raw = (build.load(pointer(name)) for name in _STORED.names[:6])
    with build.if_else(build.icmp_signed("!=", raw, _INT(0))) as (copy, jpeg):
        with copy:
            call("memcpy", target, source, size)
        with jpeg:
            own = [place(name) for name in ("own_width", "own_height", "subsampling", "colours")]
            status = pointer("status")  # for now the return value of the calls: 0, which is GOOD, or -1
            build.store(call("tjDecompressHeader3", decoder, source, size, *own), status)
            as_stated = build.icmp_signed("==", build.load(status), _INT(GOOD))
            for stated, found in ((width, "own_width"), (height, "own_height")):
                as_stated = build.and_(as_stated, build.icmp_signed("==", stated, build.load(pointer(found))))
            with build.if_then(as_stated):  # otherwise libjpeg would scale the image
                row_bytes = build.mul(width, _INT(3))
                pixels = (target, width, row_bytes, height, _INT(_RGB), _INT(_ACCURATE))
                build.store(call("tjDecompress2", decoder, source, size, *pixels), status)
            with build.if_then(build.icmp_signed("!=", build.load(status), _INT(GOOD))):
                fatal = build.icmp_signed("!=", call("tjGetErrorCode", decoder), _INT(0))
                build.store(build.select(fatal, _INT(FATAL), _INT(WARNING)), status)
                call("strncpy", place("message"), call("tjGetErrorStr2", decoder), _ADDRESS(_MESSAGE - 1))


def _compile_loop() -> tuple[llvm.ExecutionEngine, ctypes._CFuncPtr]:
    """The engine that owns the machine code, and the loop as a function that releases the GIL."""
    _find_calls()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(_write_loop())), machine)
    engine.finalize_object()
    return engine, ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)(engine.get_function_address("decode"))


_engine, _decode = _compile_loop()


def decode_stored_images(
    source: np.ndarray,
    size: np.ndarray,
    raw: np.ndarray,
    height: np.ndarray,
    width: np.ndarray,
    pixels: np.ndarray,
    offset: np.ndarray,
) -> dict[int, tuple[int, str]]:
    """Decodes n >= 1 stored images into `pixels` at `offset`, and returns those that cannot be used.

    source, size: (n,) int64, where the stored bytes of each image are in memory, and how many; raw: (n,) bool; height,
    width: (n,) int32. pixels: (bytes,) uint8, contiguous; offset: (n,) int64. The caller must keep that memory, and
    must have checked that the images stay within it and within `pixels`.
    Returns {i: (WARNING, FATAL or WRONG_SIZE, reason)}; the content of those windows is undefined. A warning of
    libjpeg-turbo counts, since pixels are then missing or wrong, except for padding before the end of an image.
    """
    images = np.zeros(len(source), _STORED)
    images["source"], images["target"] = source, pixels.ctypes.data + offset
    images["size"], images["width"], images["height"], images["raw"] = size, width, height, raw
    _decode(images.ctypes.data, images.ctypes.data + images.nbytes)
    status = images["status"]
    resized = (status == GOOD) & ~raw & ((images["own_width"] != width) | (images["own_height"] != height))
    bad = {
        i: (WRONG_SIZE, f"the JPEG is {image['own_width']} x {image['own_height']} but the index says {w} x {h}")
        for i, image, w, h in zip(np.flatnonzero(resized).tolist(), images[resized], width[resized], height[resized])
    }
    for i in np.flatnonzero(status).tolist():
        text = images["message"][i].decode("ascii", "replace")
        if status[i] != WARNING or not text.endswith(_HARMLESS):
            bad[i] = int(status[i]), text
    return bad
