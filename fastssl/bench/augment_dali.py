"""The operations of a policy in DALI, for `bench_throughput.py augment` and `peers`."""

from __future__ import annotations

import torch

from fastssl.augment.normalise import MEAN, STD
from fastssl.augment.policy import Policy
from fastssl.batch import ImageBatch
from fastssl.bench.timing import Function


def dali_view(source, policy: Policy, size: int, dtype, layout: str):
    """Adds one view of the images `source` to a pipeline and returns its node. layout: "HWC" or "CHW"."""
    import nvidia.dali.fn as fn

    def between(strength: float):
        return fn.random.uniform(range=(max(0.0, 1 - strength), 1 + strength))

    def sometimes(probability: float, changed: float, unchanged: float):
        fires = fn.random.coin_flip(probability=probability)
        return fires * changed + (1 - fires) * unchanged

    ratio = list(policy.crop_ratio)
    x = fn.random_resized_crop(source, size=[size, size], random_area=policy.crop_scale, random_aspect_ratio=ratio)
    x = fn.color_twist(
        x,
        brightness=sometimes(policy.jitter_p, between(policy.brightness), 1.0),
        contrast=sometimes(policy.jitter_p, between(policy.contrast), 1.0),
        saturation=sometimes(policy.grey_p, 0.0, sometimes(policy.jitter_p, between(policy.saturation), 1.0)),
        hue=sometimes(policy.jitter_p, fn.random.uniform(range=(-360 * policy.hue, 360 * policy.hue)), 0.0),
    )
    if policy.blur_p:
        x = fn.gaussian_blur(x, sigma=sometimes(policy.blur_p, fn.random.uniform(range=policy.blur_sigma), 0.01))
    mean, std = [255 * m for m in MEAN], [255 * s for s in STD]
    mirror = fn.random.coin_flip(probability=policy.flip_p)
    return fn.crop_mirror_normalize(x, mean=mean, std=std, mirror=mirror, dtype=dtype, output_layout=layout)


def make_dali(batch: ImageBatch, policy: Policy, size: int) -> Function:
    """A call that makes both views with DALI's operators, on the device where the batch lies."""
    import nvidia.dali.fn as fn
    import nvidia.dali.types as types
    from nvidia.dali import pipeline_def

    device = "gpu" if batch.pixels.is_cuda else "cpu"
    images = [batch.image(i) if device == "gpu" else batch.image(i).numpy() for i in range(batch.size)]
    kind = types.FLOAT16 if device == "gpu" else types.FLOAT

    @pipeline_def(
        batch_size=batch.size,
        num_threads=torch.get_num_threads(),
        device_id=(batch.pixels.device.index or 0) if device == "gpu" else None,
        seed=0,
        exec_pipelined=False,  # otherwise it would make its next batch while another contestant is timed
        exec_async=False,
    )
    def both():
        source = fn.external_source(lambda: images, device=device, layout="HWC")
        return tuple(dali_view(source, policy, size, kind, "HWC") for _ in range(2))

    pipeline = both()
    pipeline.build()
    return pipeline.run
