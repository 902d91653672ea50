"""Loops that feed the plain MoCo step of `classical.py` with DALI and FFCV, as users of these libraries write them.

DALI, after solo-learn: each image is decoded once and cropped twice, and DALI does all augmentation. FFCV, after
FFCV-SSL: a random-resized-crop decoder for each view, and the rest on the training device. Both train with AMP where
our loop computes in 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastssl.augment.policy import make_policy
from fastssl.bench.classical import check_fill, make_classical_step
from fastssl.bench.loops import Loop, time_steps
from fastssl.bench.photos import train_folder
from fastssl.config import Config
from fastssl.data_prep.find import find_images
from fastssl.distributed import Ranks
from fastssl.machine.precision import choose_precision


def uses_amp(config: Config, ranks: Ranks) -> bool:
    """Whether our own loop computes in 16 bits on this device; where it does, the peers do too."""
    return choose_precision(config.train.precision, ranks.device) != "fp32"


def dali_loop(data: str, config: Config, ranks: Ranks, workers: int) -> Loop:
    """Views by DALI from data/train/<class>/* or data/<class>/*, decoded and augmented on the GPU if there is one."""
    import nvidia.dali.fn as fn
    import nvidia.dali.types as types
    from nvidia.dali import pipeline_def
    from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

    from fastssl.bench.augment_dali import dali_view

    check_fill(len(find_images(train_folder(data)).paths), config)
    gpu, size = ranks.device.type == "cuda", config.augment.image_size
    policy = make_policy("v2")

    @pipeline_def(
        batch_size=config.train.batch_size, num_threads=workers, device_id=0 if gpu else None, seed=config.train.seed
    )
    def two_views():
        encoded, _ = fn.readers.file(file_root=train_folder(data), random_shuffle=True, name="files")
        image = fn.decoders.image(encoded, device="mixed" if gpu else "cpu", output_type=types.RGB)
        return tuple(dali_view(image, policy, size, types.FLOAT, "CHW") for _ in range(2))

    names = ["view_q", "view_k"]
    iterator = DALIGenericIterator(
        two_views(), names, reader_name="files", auto_reset=True, last_batch_policy=LastBatchPolicy.DROP
    )
    step = make_classical_step(config, ranks.device, amp=uses_amp(config, ranks))

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            found = next(iterator, None)  # None at the end of an epoch; the next call begins another
            if found is not None:
                yield found[0]["view_q"], found[0]["view_k"]

    return lambda steps: time_steps(batches(), lambda batch, number: step(*batch), steps)


def ffcv_loop(beton: str, config: Config, ranks: Ranks, workers: int) -> Loop:
    """Crops by FFCV from a .beton file, each image decoded twice; jitter, blur and flip on the device."""
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline.pipeline_spec import PipelineSpec
    from ffcv.transforms import ToDevice, ToTensor, ToTorchImage

    from fastssl.bench.peer_views import augment_crops

    size, gpu = config.augment.image_size, ranks.device.type == "cuda"
    decoders = [RandomResizedCropRGBImageDecoder((size, size), scale=(0.2, 1.0)) for _ in range(2)]

    def rest() -> list:
        to_device = [ToDevice(ranks.device, non_blocking=True)] if gpu else []
        return [ToTensor(), *to_device, ToTorchImage()]

    loader = Loader(
        beton,
        batch_size=config.train.batch_size,
        num_workers=workers,
        order=OrderOption.RANDOM,
        drop_last=True,
        pipelines={
            "image": [decoders[0], *rest()],
            "view_k": PipelineSpec("image", decoder=decoders[1], transforms=rest()),
            "label": None,
        },
    )
    check_fill(loader.reader.num_samples, config)
    plain, threads = make_classical_step(config, ranks.device, amp=uses_amp(config, ranks)), torch.get_num_threads()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            epoch = iter(loader)
            try:
                yield from epoch
            finally:
                epoch.close()  # otherwise its thread would wait for ever
                torch.set_num_threads(threads)  # FFCV changes it for the whole process

    def step(batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        return plain(*map(augment_crops, batch))

    return lambda steps: time_steps(batches(), step, steps)
