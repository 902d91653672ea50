"""`bench_throughput.py augment [PHOTOS]`: both views of a batch, by our code, torchvision, kornia and DALI.

The images are already decoded, and where each contestant wants them (ours: bytes on the device); what is timed ends
with two normalised batches on the device. The floor is the time that reading the crops and writing the views would take
at the speed of a copy, measured in the same run. On a CPU, torchvision also runs as in a DataLoader's workers: in one
process for each of our threads, without the cost of stacking and sending views. kornia and DALI have the same list of
operations, but not the same views (DALI's hue is linear, its order of operations fixed). triton-augment has no
resizing, hue or blur, so it is compared with ours restricted to its operations.
"""

from __future__ import annotations

import argparse
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastssl.arguments import ListParser, positive
from fastssl.augment.choose import choose_augment_kernel
from fastssl.augment.params import sample_both
from fastssl.augment.policy import POLICIES, Policy, make_policy
from fastssl.augment.views import make_views
from fastssl.batch import ImageBatch, pack_images
from fastssl.bench.augment_dali import make_dali
from fastssl.bench.augment_peers import (
    equal_sizes,
    make_kornia,
    make_triton_augment,
    part_policy,
    per_image,
    torchvision_chain,
)
from fastssl.bench.compare import announce
from fastssl.bench.device import open_device
from fastssl.bench.pil_processes import in_processes
from fastssl.bench.results import write_result
from fastssl.bench.timing import Function, time_calls
from fastssl.data_prep.decode import decode_image
from fastssl.data_prep.find import find_images
from fastssl.loaders.synthetic_loader import SyntheticLoader
from fastssl.machine.host_memory import keep_freed_memory

KORNIA, DALI = "kornia, compiled", "DALI"
# both with only crop, flip, jitter without hue, greyscale and normalisation
OUR_PART, TRITON_AUGMENT = "ours, its part", "triton-augment, its part"


def make_contestants(
    batch: ImageBatch, policy: Policy, size: int, dtype: torch.dtype
) -> tuple[dict[str, Function], dict[str, str]]:
    """({name: a call that makes both views}, {name: why it is not measured})."""
    device = batch.pixels.device
    tensors = [batch.image(i).permute(2, 0, 1) for i in range(batch.size)]
    pictures = [Image.fromarray(batch.image(i).cpu().numpy()) for i in range(batch.size)]
    on_pil = torchvision_chain(policy, size, on_pil=True)
    on_tensors = torchvision_chain(policy, size, on_pil=False)
    reference = partial(make_views, batch, policy, size, 0, 0, dtype, "reference")
    contestants: dict[str, Function] = {"ours, reference": reference}
    missing = {}
    chosen, why = choose_augment_kernel(device)
    if chosen == "reference":
        missing["ours, compiled"] = why
    else:
        contestants[f"ours, {chosen}"] = partial(make_views, batch, policy, size, 0, 0, dtype, chosen)
    contestants["torchvision, PIL images"] = partial(per_image, pictures, on_pil, torch.float32, device)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        contestants[f"torchvision, PIL, {threads} workers"] = in_processes(pictures, on_pil, threads)
    contestants[f"torchvision, {device.type} tensors"] = partial(per_image, tensors, on_tensors, dtype, device)
    missing |= obstacles(batch, size)
    peers = {KORNIA: partial(make_kornia, batch, policy, size, dtype), DALI: partial(make_dali, batch, policy, size)}
    if TRITON_AUGMENT not in missing:
        part = part_policy(batch, policy, size)
        contestants[OUR_PART] = partial(make_views, batch, part, size, 0, 0, dtype)
        peers[TRITON_AUGMENT] = partial(make_triton_augment, batch, part, size, dtype)
    for name in [name for name in peers if name not in missing]:
        try:
            peer = peers[name]()
            peer()
            contestants[name] = peer
        except Exception as error:  # other libraries may raise anything, and the rest is still to be measured
            missing[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return contestants, missing


def obstacles(batch: ImageBatch, size: int) -> dict[str, str]:
    """The peers that cannot be measured on this batch, each with the reason."""
    reasons = {}
    if not equal_sizes(batch):
        reasons[KORNIA] = "needs images of one size"
    if not batch.pixels.is_cuda:
        reasons[TRITON_AUGMENT] = "needs a GPU"
    elif batch.max_side < size or not equal_sizes(batch, square=True):
        reasons[TRITON_AUGMENT] = "cannot resize: it needs square images of one size, no smaller than the views"
    for name, module in {KORNIA: "kornia", DALI: "nvidia.dali", TRITON_AUGMENT: "triton_augment"}.items():
        if find_spec(module.split(".")[0]) is None or find_spec(module) is None:
            reasons[name] = "not installed"
    return reasons


def read_photos(folder: str, count: int, short_side: int | None) -> ImageBatch:
    """`count` images, evenly spread over a folder; larger ones are reduced to `short_side` pixels.

    Raises ValueError for a folder that holds fewer images.
    """
    found = find_images(folder)
    if len(found.paths) < count:
        raise ValueError(f"{folder} holds fewer than {count} images: set --batch-size to at most {len(found.paths)}")
    images = []
    for i in range(count):
        image = Image.fromarray(decode_image(Path(found.root) / found.paths[i * len(found.paths) // count]))
        scale = min(1.0, (short_side or min(image.size)) / min(image.size))
        images.append(np.asarray(image.resize([round(side * scale) for side in image.size], Image.Resampling.BILINEAR)))
    return pack_images(images, range(count), [0] * count)


def moved_bytes(batch: ImageBatch, policy: Policy, size: int, dtype: torch.dtype) -> int:
    """The bytes that every implementation must move: it reads the crops once and writes the views once."""
    crops = sum(int((p.crop_height.long() * p.crop_width).sum()) for p in sample_both(policy, batch, 0, 0))
    return 3 * crops + 2 * batch.size * 3 * size**2 * dtype.itemsize


def copy_speed(device: torch.device, rounds: int) -> float:
    """Bytes that a large copy reads and writes per second."""
    source = torch.zeros(2**28 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = time_calls({"copy": lambda: target.copy_(source)}, device, rounds)["copy"]
    return 2 * source.numel() / timing.median


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    cuda = torch.cuda.is_available()
    parser = ListParser(prog="bench_throughput.py augment", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("photos", nargs="?", help="folder of images (default: synthetic ones)")
    add("--device", default="cuda" if cuda else "cpu", help="device (default: the GPU if there is one)")
    policies = [name for name, policy in POLICIES.items() if policy.crop_scale]
    add("--policy", default="v2", choices=policies, help="augmentation policy (default v2)")
    add("--batch-size", type=positive, default=256 if cuda else 32, help="images per batch (default %(default)s)")
    add("--size", type=positive, nargs="+", default=[224], help="sides of the views in pixels (default 224)")
    add("--source-size", type=positive, default=256, help="side of a synthetic image in pixels (default 256)")
    add("--short-side", type=positive, help="first reduce photographs to this short side")
    add("--threads", type=positive, default=1, help="CPU threads (default 1)")
    add("--rounds", type=positive, default=30 if cuda else 7, help="measurements of each (default %(default)s)")
    add("--output", type=Path, help="write the result to this JSON file")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Measures, prints, and writes JSON with device, versions and commit."""
    args = parse(argv)
    device, dtype = open_device(args.device), torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    policy, count = make_policy(args.policy), args.batch_size
    torch.set_num_threads(args.threads)
    if device.type == "cpu":
        keep_freed_memory()  # as training does
    batch = read_batch(args, device)
    sources = {"photos": bool(args.photos), "short_side": args.short_side, "max_side": batch.max_side}
    settings = {"policy": args.policy, "batch_size": count, **sources}
    announce(settings | {"lines": [{"size": size} for size in args.size]})
    speed, lines = copy_speed(device, args.rounds), []
    for size in args.size:
        contestants, missing = make_contestants(batch, policy, size, dtype)
        timings = time_calls(contestants, device, args.rounds)
        work = moved_bytes(batch, policy, size, dtype)
        part = moved_bytes(batch, part_policy(batch, policy, size), size, dtype) if OUR_PART in contestants else work
        images = f"{count} images of up to {batch.max_side} pixels"
        print(f"policy {args.policy}, {images}, views of {size} pixels, {work:,} bytes to move")
        for name, timing in timings.items():
            print_line(name, timing, count, (part if name in (OUR_PART, TRITON_AUGMENT) else work) / speed)
        for name, reason in missing.items():
            print(f"  {name:28} {reason}")
        seconds = {name: timing._asdict() for name, timing in timings.items()}
        lines.append({"size": size, "seconds": seconds, "not_measured": missing, "bytes": work})
        write_result(args.output, settings | {"copy": speed, "lines": lines}, device=str(device))


def read_batch(args: argparse.Namespace, device: torch.device) -> ImageBatch:
    """The images to make views of: photographs, or synthetic ones."""
    count, size = args.batch_size, args.source_size
    if args.photos:
        return read_photos(args.photos, count, args.short_side).to(device)
    return next(SyntheticLoader(num_images=count, size=size, batch_size=count, seed=0, device=device).batches())


def print_line(name: str, timing, count: int, floor: float) -> None:
    """Prints one contestant: the time of a pair with its spread, pairs per second, percent of the floor."""
    median, low, high = (1e6 * seconds / count for seconds in (timing.median, timing.low, timing.high))
    print(
        f"  {name:28} {median:9.1f} us a pair ({low:.1f} to {high:.1f}), {1e6 / median:9.0f} pairs/s, "
        f"{100 * floor / timing.median:5.1f} % of the floor",
        flush=True,
    )
