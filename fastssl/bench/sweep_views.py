"""Measures ways to cut the launches of the views on the GPU at hand, for `Launch` in `kernels/views.py`.

    python -m fastssl.bench.sweep_views --size 224 --batch-size 256

Prints the microseconds of each launch for every cut, for a batch of synthetic images of 256 pixels with policy v2.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator
from statistics import median
from unittest import mock

import torch

from fastssl.augment.policy import make_policy
from fastssl.augment.views import make_views
from fastssl.kernels import views
from fastssl.kernels.views import Launch
from fastssl.loaders.synthetic_loader import SyntheticLoader

ROUNDS = 6


def candidates() -> Iterator[Launch]:
    """The cut in use, then others: of tiles and warps in launches one and three, of rows in launch two."""
    yield Launch()
    for tile, tiles, warps in [
        (8, 25, 1), (8, 98, 1), (8, 49, 2), (8, 98, 2), (8, 196, 1),
        (16, 13, 1), (16, 13, 2), (16, 13, 4), (16, 25, 4), (16, 25, 8), (32, 7, 4), (32, 7, 8),
    ]:  # fmt: skip
        yield Launch(tile=tile, tiles=tiles, warps=(warps, 8, warps))
    for row_pixels, block, warps in [(1024, 512, 4), (2048, 512, 4), (2048, 1024, 4), (4096, 512, 4), (8192, 1024, 8)]:
        yield Launch()._replace(row_pixels=row_pixels, block=block, warps=(Launch().warps[0], warps, Launch().warps[2]))


def time_launches(cut: Launch, size: int, batch_size: int) -> dict[str, float]:
    """The microseconds of each launch: medians of ROUNDS rounds."""
    loader = SyntheticLoader(num_images=batch_size, size=256, batch_size=batch_size, seed=0, device="cuda")
    batch, policy, found = next(loader.batches()), make_policy("v2"), defaultdict(list)
    with mock.patch.object(views, "COMPILED", cut):
        make_views(batch, policy, size, 0, 0, torch.bfloat16, "triton")  # compiles
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
            for _ in range(ROUNDS):
                make_views(batch, policy, size, 0, 0, torch.bfloat16, "triton")
            torch.cuda.synchronize()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name].append(event.device_time)
    return {name: median(times) for name, times in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=224, help="side of the views in pixels (default 224)")
    parser.add_argument("--batch-size", type=int, default=256, help="images in the batch (default 256)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("sweep_views needs a GPU, but torch finds none: run `fastssl doctor`", file=sys.stderr)
        return 1
    for cut in candidates():
        times = time_launches(cut, args.size, args.batch_size)
        print(f"{tuple(cut)}  {', '.join(f'{name} {us:.0f} us' for name, us in times.items())}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
