"""The contract that all loaders share, and `make_loader`, which makes one by name."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Protocol

import torch

from fastssl.batch import ImageBatch
from fastssl.data_prep.find import find_images
from fastssl.loaders import file_decode
from fastssl.loaders.beton_file import open_beton
from fastssl.loaders.choose import choose_loader
from fastssl.loaders.encoded import from_folder, open_encoded
from fastssl.loaders.order import Order
from fastssl.loaders.resident_loader import LOAD_AHEAD, ResidentLoader
from fastssl.loaders.stream_loader import Decoder, StreamLoader
from fastssl.loaders.synthetic_loader import SyntheticLoader


class Loader(Protocol):
    """What every loader gives: for the same seed the same images in the same order, as ImageBatch on the device.

    `batches(first)` is endless. Batch b belongs to epoch b // batches_per_epoch, ranks get disjoint shares
    (`order.py`), and starting at `first` gives exactly what the uninterrupted iterator gives from there. Dropping or
    closing an iterator ends its threads; an error in a thread is raised by the iterator.
    """

    name: str  # which loader this is
    reason: str  # why it was chosen, in a few words
    num_images: int
    batches_per_epoch: int
    class_names: list[str]  # empty when the data set has no classes
    bad_images: list[str]  # "path: reason" of the unreadable images met so far; only ever appended to
    decoded: int  # images decoded so far, including those read ahead
    notices: Sequence[str]  # sentences on what one might not expect of the files

    def batches(self, first: int = 0) -> Iterator[ImageBatch]: ...

    def eval_batches(
        self, batch_size: int, rank: int = 0, world_size: int = 1, limit: int | None = None
    ) -> Iterator[ImageBatch]: ...

    def close(self) -> None: ...


def make_loader(
    name: str,
    data: str | os.PathLike | None,
    *,
    batch_size: int,
    seed: int,
    device: torch.device | str,
    rank: int = 0,
    world_size: int = 1,
    workers: int | None = None,
    read_ahead: int | None = None,
    on_bad_image: str = "skip",
    class_names: Sequence[str] | None = None,
    shuffle: str = "full",
    block_size: int = 128,
    beton_cache: str = "page",
    resident_shard: bool = False,
    synthetic_images: int = 2048,
    synthetic_size: int = 256,
) -> Loader:
    """The loader called `name` ("auto" chooses one) for `data`. batch_size: per rank (evaluation does not use it).

    workers: decoding threads, None for this process's share of the cores. read_ahead: batches decoded while the device
    trains (`Prefetcher`). on_bad_image: "skip" or "error" (`BadImages`). shuffle: "full", or "blocks" of
    `block_size` images for data sets larger than memory (`order.Order`). beton_cache: "page" or "process"
    (`StoredImages`). resident_shard: each rank holds only its share (`ResidentLoader`).
    Raises ValueError for an unknown name or option, data that the loader cannot read, and less than one global batch.
    """
    name, reason = choose_loader(name, data)
    _check_options(on_bad_image, workers, read_ahead)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must lie between 0 and world_size - 1, got {rank} of {world_size}")
    order = Order(shuffle, block_size)
    shares = dict(batch_size=batch_size, seed=seed, rank=rank, world_size=world_size, order=order)
    if name == "synthetic":
        loader = SyntheticLoader(synthetic_images, synthetic_size, device, **shares)
    else:
        ahead = LOAD_AHEAD if name == "resident" else read_ahead
        reading = dict(device=device, workers=workers, read_ahead=ahead, on_bad_image=on_bad_image)
        loader = StreamLoader(_open_decoder(name, data, class_names, beton_cache, **reading), **shares)
    if name == "resident":
        with closing(loader) as source:
            loader = ResidentLoader(source, os.fspath(data), resident_shard)
        reason = f"{reason}; holds {loader.held}"
    if name == "folder" and file_decode.decode_stored_images is None:
        reason += "; slower without libturbojpeg: 'fastssl doctor' says how to install it"
    loader.name, loader.reason = name, reason
    return loader


def _check_options(on_bad_image: str, workers: int | None, read_ahead: int | None) -> None:
    if on_bad_image not in ("skip", "error"):
        raise ValueError(f"on_bad_image must be 'skip' or 'error', got {on_bad_image!r}")
    if workers is not None and workers < 0:
        raise ValueError(f"workers must be 0 or more, got {workers}")
    if read_ahead is not None and read_ahead < 0:
        raise ValueError(f"read_ahead must be 0 or more batches, got {read_ahead}")


def _open_decoder(
    name: str, data: str | os.PathLike, class_names: Sequence[str] | None, beton_cache: str, **reading: object
) -> Decoder:
    """What decodes the files, imported only now, because the libraries that it needs may be missing."""
    try:
        if name == "dali":
            from fastssl.loaders.dali_batches import DaliDecoder

            return DaliDecoder(open_encoded(data, class_names), **reading)
        if name == "beton" or (name == "resident" and not os.path.isdir(data)):
            from fastssl.loaders.beton_decode import BetonDecoder

            return BetonDecoder(open_beton(data, class_names), beton_cache, **reading)
        return file_decode.FileDecoder(from_folder(find_images(data, class_names)), **reading)
    except ImportError as error:
        raise ValueError(
            f"the loader {name!r} needs a library that is missing ({error}): run 'fastssl doctor' for the command that "
            "installs it"
        ) from error
