"""Decodes batches of JPEGs with NVIDIA DALI, on the GPU if there is one, into one flat buffer in the given order."""

from __future__ import annotations

import ctypes
import io
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

DEPTH = 2  # batches that DALI works on at once
_HARDWARE_SHARE = 0.65  # the share of a batch for the GPU's JPEG engine (A100 and later); its cores get the rest
_OTHERWISE = (
    "use --loader folder for image files, --loader beton for a .beton file (fastssl prep beton makes one of tar shards)"
)


class DaliFailed(RuntimeError):
    """DALI failed on a batch; the decoder that raised this cannot be used again."""


class JpegDecoder:
    """Decodes batches of up to `max_batch` JPEGs, whole and at their own size, asynchronously and in order.

    On a CUDA device it uses DALI's `mixed` decoder (Huffman codes on CPU threads or in the JPEG engine), otherwise
    `threads` CPU threads. Raises ValueError if DALI is not installed or does not work.
    """

    def __init__(self, max_batch: int, threads: int, device: torch.device) -> None:
        try:
            from nvidia import dali
            from nvidia.dali import fn, types
        except ImportError as error:
            raise ValueError(
                f"the loader 'dali' cannot import nvidia.dali ({error}): install nvidia-dali-cuda120 (with CUDA 13 "
                f"nvidia-dali-cuda130), or {_OTHERWISE}"
            ) from error
        on_gpu = device.type == "cuda"
        options = {"device": "mixed", "hw_decoder_load": _HARDWARE_SHARE} if on_gpu else {"device": "cpu"}
        if on_gpu and "jpeg_fancy_upsampling" in dali.backend.GetSchema("decoders__Image").GetArgumentNames():
            options["jpeg_fancy_upsampling"] = True  # upsamples chroma as libjpeg-turbo does; since DALI 1.23
        self._pipeline = dali.Pipeline(
            batch_size=max_batch,
            num_threads=threads,
            device_id=device.index if on_gpu else None,
            prefetch_queue_depth=DEPTH,
        )
        with self._pipeline:
            encoded = fn.external_source(name="encoded", device="cpu", no_copy=True)
            self._pipeline.set_outputs(fn.decoders.image(encoded, output_type=types.RGB, **options))
        self._pipeline.build()
        self._held: deque[Sequence[np.ndarray]] = deque()  # keeps the arrays alive that DALI reads in place
        self._failure: DaliFailed | None = None
        self._prime(device)

    def _prime(self, device: torch.device) -> None:
        """Decodes a grey dot DEPTH times: DALI's first `schedule_run` starts DEPTH runs, later calls start one each.

        Raises ValueError when DALI cannot decode even that.
        """
        encoded = io.BytesIO()
        Image.new("RGB", (8, 8), "grey").save(encoded, "JPEG")
        dot = [np.frombuffer(encoded.getvalue(), dtype=np.uint8)]
        try:
            for _ in range(DEPTH):
                self._pipeline.feed_input("encoded", dot)
            self._pipeline.schedule_run()
            for _ in range(DEPTH):
                self._pipeline.share_outputs()
                self._pipeline.release_outputs()
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"DALI cannot decode on {device} ({reason}): {_OTHERWISE}") from error

    def submit(self, jpegs: Sequence[np.ndarray]) -> None:
        """Starts decoding a batch of (bytes,) uint8 arrays; at most DEPTH batches may wait to be received."""
        self._held.append(jpegs)
        if not jpegs or self._failure:
            return
        try:
            self._pipeline.feed_input("encoded", list(jpegs))
            self._pipeline.schedule_run()
        except RuntimeError as error:  # perhaps about an earlier batch; `receive` raises it in order
            self._failure = DaliFailed(str(error))

    def receive(self, allocate: Callable[[int], Tensor]) -> tuple[Tensor, np.ndarray]:
        """The oldest batch: its pixels, and heights and widths (n, 2) int64. Raises DaliFailed.

        `allocate(n)` returns a uint8 tensor of at least n bytes on the decoder's device; the images are copied to its
        beginning, back to back (on a GPU on torch's current stream; the copy is complete on return).
        """
        if self._failure:
            raise self._failure
        jpegs = self._held.popleft()
        if not jpegs:
            return allocate(0), np.empty((0, 2), np.int64)
        try:
            (images,) = self._pipeline.share_outputs()
            shapes = np.array([shape[:2] for shape in images.shape()], dtype=np.int64)
            pixels = allocate(int(shapes.prod(axis=1).sum()) * 3)
            stream = ()
            if pixels.is_cuda:
                stream = (ctypes.c_void_p(torch.cuda.current_stream(pixels.device).cuda_stream),)
            images.copy_to_external(ctypes.c_void_p(pixels.data_ptr()), *stream)
            del images  # must not outlive the outputs
            self._pipeline.release_outputs()
        except RuntimeError as error:
            self._failure = DaliFailed(str(error))
            raise self._failure from error
        return pixels, shapes
