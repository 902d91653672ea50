"""The loaders that `bench_throughput.py loader` compares, ours and others'.

The others yield two random resized crops of 224 pixels with MoCo v2's scale, made on the CPU, antialiased where the
library can do that. Ours yield the whole decoded image, since our crops are made on the training device.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from fastssl.bench.results import RAW
from fastssl.loaders.choose import LOADERS
from fastssl.loaders.make import make_loader
from fastssl.machine.system_packages import install_command

SCALE = (0.2, 1.0)
SIZE = 224
FFCV = "FFCV, two decoders"
READ_AHEAD = 2  # batches
_TJPF_RGB = 0
_TO_RGB = (0, 1, 2)  # the colour spaces that it converts: RGB, YCbCr and grey, but not CMYK

Epoch = Callable[[], Iterator[int]]  # runs over all images once and yields the number of pairs of each batch


class Options(NamedTuple):
    """The files and settings that all loaders are given."""

    folder: str
    beton: str | None
    batch_size: int
    threads: int


def start_ours(name: str, options: Options) -> Callable[[], Epoch]:
    """One of our loaders. One iterator serves all epochs, and reads ahead as it does for a GPU."""
    data = options.folder if name in ("folder", "dali") else options.beton
    if data is None:
        raise ValueError(f"the loader {name!r} reads a .beton file: give one with --beton")
    if name == "dali":
        import nvidia.dali  # noqa: F401  (if it is missing, this contestant is left out)

    def start() -> Epoch:
        shared = {"batch_size": options.batch_size, "seed": 0, "device": "cpu"}
        loader = make_loader(name, data, workers=options.threads, read_ahead=READ_AHEAD, **shared)
        batches = loader.batches()
        return lambda: (batch.size for batch in itertools.islice(batches, loader.batches_per_epoch))

    return start


def start_raw_decoding(options: Options) -> Callable[[], Epoch]:
    """libjpeg-turbo's decompressor, called in a loop on files in memory: the most that any loader can get out of it.

    Raises ValueError if it turns down over a hundredth of the files, such as PNGs or CMYK, which take it no time.
    """
    name = ctypes.util.find_library("turbojpeg")
    if name is None:
        raise ValueError(f"libturbojpeg is not installed: {install_command('decoder')}")
    turbo = ctypes.CDLL(name)
    turbo.tjInitDecompress.restype = ctypes.c_void_p
    from fastssl.loaders.encoded import open_encoded

    encoded = open_encoded(options.folder)
    handle = ctypes.c_void_p(turbo.tjInitDecompress())
    files = [data for i in range(len(encoded.label)) if _sides(turbo, handle, data := encoded.read(i))]
    turbo.tjDestroy(handle)
    if len(files) < 0.99 * len(encoded.label):
        raise ValueError(f"only {len(files)} of the {len(encoded.label)} files are JPEGs that it turns into RGB")

    def decode(part: list[bytes]) -> int:
        handle, pixels = ctypes.c_void_p(turbo.tjInitDecompress()), ctypes.create_string_buffer(1 << 20)
        for data in part:
            width, height = _sides(turbo, handle, data)
            if (need := width * height * 3) > len(pixels):
                pixels = ctypes.create_string_buffer(need)
            turbo.tjDecompress2(handle, data, ctypes.c_ulong(len(data)), pixels, width, 0, height, _TJPF_RGB, 0)
        turbo.tjDestroy(handle)
        return len(part)

    def start() -> Epoch:
        pool = ThreadPoolExecutor(options.threads)
        parts = [files[i : i + options.batch_size] for i in range(0, len(files), options.batch_size)]
        return lambda: pool.map(decode, parts)

    return start


def _sides(turbo: ctypes.CDLL, handle: ctypes.c_void_p, data: bytes) -> tuple[int, int] | None:
    """The width and height of a JPEG, from its header; None if libjpeg-turbo cannot turn it into RGB."""
    width, height, _, colours = facts = [ctypes.c_int() for _ in range(4)]
    refused = turbo.tjDecompressHeader3(handle, data, ctypes.c_ulong(len(data)), *map(ctypes.byref, facts))
    return None if refused or colours.value not in _TO_RGB else (width.value, height.value)


def start_torchvision(kind: str, options: Options) -> Callable[[], Epoch]:
    """ImageFolder and DataLoader: the image is decoded once, and both views are made from it.

    kind: "crops" (Pillow), "full" (all of MoCo v2's augmentation, Pillow), "tensor" (torchvision's own decoder and
    antialiased resize).
    """
    from torch import Tensor
    from torch.utils.data import DataLoader
    from torchvision import io, transforms
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import default_loader
    from torchvision.transforms import v2

    from fastssl.bench.classical_views import TwoViews

    def read_tensor(path: str) -> Tensor:
        return io.decode_image(io.read_file(path), io.ImageReadMode.RGB)

    if kind == "tensor":
        read, crop = read_tensor, v2.RandomResizedCrop(SIZE, SCALE, antialias=True)
    else:
        read = default_loader
        crop = transforms.Compose([transforms.RandomResizedCrop(SIZE, SCALE), transforms.PILToTensor()])
    two_views = TwoViews(SIZE) if kind == "full" else lambda image: (crop(image), crop(image))
    images = ImageFolder(options.folder, two_views, loader=read)

    def start() -> Epoch:
        loader = DataLoader(
            images,
            options.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=options.threads,
            persistent_workers=True,
            multiprocessing_context="fork",  # the usual default; this process has not started any thread yet
        )
        return lambda: (len(label) for _, label in loader)

    return start


def start_ffcv(options: Options) -> Callable[[], Epoch]:
    """FFCV's way to make two views: a random-resized-crop decoder for each, so every image is decoded twice."""
    if options.beton is None:
        raise ValueError("FFCV reads a .beton file: give one with --beton")
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline.pipeline_spec import PipelineSpec
    from ffcv.transforms import ToTensor

    def start() -> Epoch:
        one, two = (RandomResizedCropRGBImageDecoder((SIZE, SIZE), scale=SCALE) for _ in range(2))
        loader = Loader(
            options.beton,
            batch_size=options.batch_size,
            num_workers=options.threads,
            order=OrderOption.RANDOM,
            drop_last=True,
            pipelines={
                "image": [one, ToTensor()],
                "view_k": PipelineSpec("image", decoder=two, transforms=[ToTensor()]),
            },
        )
        return lambda: (len(batch[0]) for batch in loader)

    return start


def start_dali(options: Options) -> Callable[[], Epoch]:
    """DALI's usual CPU pipeline: its file reader, one decode, two antialiased random resized crops."""
    from nvidia import dali
    from nvidia.dali import fn, types

    def start() -> Epoch:
        pipeline = dali.Pipeline(batch_size=options.batch_size, num_threads=options.threads, device_id=None)
        with pipeline:
            encoded, label = fn.readers.file(file_root=options.folder, random_shuffle=True, name="files")
            image = fn.decoders.image(encoded, output_type=types.RGB)
            crops = [fn.random_resized_crop(image, size=SIZE, random_area=SCALE, antialias=True) for _ in range(2)]
            pipeline.set_outputs(*crops, label)
        pipeline.build()
        batches = pipeline.epoch_size("files") // options.batch_size
        return lambda: (len(pipeline.run()[0]) for _ in range(batches))

    return start


OTHERS: dict[str, Callable[[Options], Callable[[], Epoch]]] = {
    RAW: start_raw_decoding,
    "torchvision, tensors": partial(start_torchvision, "tensor"),
    "torchvision, Pillow": partial(start_torchvision, "crops"),
    "torchvision, full MoCo v2": partial(start_torchvision, "full"),
    FFCV: start_ffcv,
    "DALI, its own pipeline": start_dali,
}
OURS = {f"ours, {name}": partial(start_ours, name) for name in LOADERS if name != "synthetic"}
# name -> a function that imports the library and returns a function that builds the loader; ValueError if it cannot run
CONTESTANTS = OURS | OTHERS
DECODES = {FFCV: 2}  # how often an image is decoded for a pair of views; once by loaders that are not listed
