"""`bench_throughput.py augment [PHOTOS]`: two views of a batch, ours beside torchvision per image, kornia and DALI.

Images wait decoded where the contestant wants them (ours: bytes on the device); what is timed ends with two
normalised batches on the device. The floor is what the crops' bytes and the views' take at the speed of a copy
measured in the same run. On a CPU the per-image pipeline also runs as a DataLoader's workers run it: one process for
each of our threads, nothing stacked or sent. Neither kornia nor DALI makes the same views (DALI's hue is linear, its
order of operations is fixed), but the same list of operations. triton-augment knows neither resizing, hue nor blur:
beside it stands ours with the operations it has.
"""

from __future__ import annotations

import argparse
import json
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
from fastssl.bench.augment_peers import (
    equal_sizes,
    make_kornia,
    make_triton_augment,
    part_policy,
    per_image,
    torchvision_chain,
)
from fastssl.bench.pil_processes import in_processes
from fastssl.bench.timing import Function, time_calls
from fastssl.data_prep.images import decode_image, find_images
from fastssl.environment import environment
from fastssl.host_memory import keep_freed_memory
from fastssl.loaders.synthetic_loader import SyntheticLoader

KORNIA, DALI = "kornia, compiled", "DALI"
PART = ("ours, its part", "triton-augment, its part")  # crop, flip, jitter without hue, greyscale, normalise


def make_contestants(
    batch: ImageBatch, policy: Policy, size: int, dtype: torch.dtype
) -> tuple[dict[str, Function], dict[str, str]]:
    """Name -> a call that makes both views; and name -> why it is not measured."""
    device = batch.pixels.device
    tensors = [batch.image(i).permute(2, 0, 1) for i in range(batch.size)]
    pictures = [Image.fromarray(t.permute(1, 2, 0).cpu().numpy()) for t in tensors]
    on_pil, on_tensors = (torchvision_chain(policy, size, on_pil) for on_pil in (True, False))
    reference = partial(make_views, batch, policy, size, 0, 0, dtype, "reference")
    contestants: dict[str, Function] = {"ours, reference": reference}
    missing = {}
    chosen, why = choose_augment_kernel(device)
    if chosen == "reference":
        missing["ours, compiled"] = why
    else:
        contestants[f"ours, {chosen}"] = partial(make_views, batch, policy, size, 0, 0, dtype, chosen)
    contestants["torchvision, PIL images"] = partial(per_image, pictures, on_pil, torch.float32)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        contestants[f"torchvision, PIL, {threads} workers"] = in_processes(pictures, on_pil, threads)
    contestants[f"torchvision, {device.type} tensors"] = partial(per_image, tensors, on_tensors, dtype)
    missing |= obstacles(batch, size)
    if KORNIA not in missing:
        contestants[KORNIA] = make_kornia(batch, policy, size, dtype)
    if DALI not in missing:
        from fastssl.bench.augment_dali import make_dali

        contestants[DALI] = make_dali(batch, policy, size)
    if PART[1] not in missing:
        part = part_policy(batch, policy, size)
        contestants[PART[0]] = partial(make_views, batch, part, size, 0, 0, dtype)
        contestants[PART[1]] = make_triton_augment(batch, part, size, dtype)
    return contestants, missing


def obstacles(batch: ImageBatch, size: int) -> dict[str, str]:
    """Peers that cannot be measured on this batch, by name, and why."""
    reasons = {}
    if not equal_sizes(batch):
        reasons[KORNIA] = "takes images of one size only"
    if not batch.pixels.is_cuda:
        reasons[PART[1]] = "runs on a GPU only"
    elif batch.max_side < size or not equal_sizes(batch, square=True):
        reasons[PART[1]] = "crops without resizing: here it takes square images of one size, no smaller than the views"
    for name, module in {KORNIA: "kornia", DALI: "nvidia.dali", PART[1]: "triton_augment"}.items():
        if find_spec(module.split(".")[0]) is None or find_spec(module) is None:
            reasons[name] = "not installed"
    return reasons


def read_photos(folder: str, count: int, short_side: int | None) -> ImageBatch:
    """`count` images of a folder, evenly spread, none enlarged. Raises ValueError for a folder that holds fewer."""
    found = find_images(folder)
    if len(found.paths) < count:
        raise ValueError(f"{folder} holds {len(found.paths)} images, fewer than the batch of {count}: set --batch-size")
    images = []
    for i in range(count):
        image = Image.fromarray(decode_image(Path(found.root) / found.paths[i * len(found.paths) // count]))
        scale = min(1.0, (short_side or min(image.size)) / min(image.size))
        images.append(np.asarray(image.resize([round(side * scale) for side in image.size], Image.Resampling.BILINEAR)))
    return pack_images(images, range(count), [0] * count)


def moved_bytes(batch: ImageBatch, policy: Policy, size: int, dtype: torch.dtype) -> int:
    """What no implementation can avoid: the crops read once each, the views written once."""
    crops = sum(int((p.crop_height.long() * p.crop_width).sum()) for p in sample_both(policy, batch, 0, 0))
    return 3 * crops + 2 * batch.size * 3 * size**2 * dtype.itemsize


def copy_speed(device: torch.device, rounds: int) -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.zeros(2**28 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = time_calls({"copy": lambda: target.copy_(source)}, device, rounds)["copy"]
    return 2 * source.numel() / timing.median


def main(argv: list[str]) -> None:
    """Measures, prints and writes JSON with device, versions and commit."""
    cuda = torch.cuda.is_available()
    parser = ListParser(prog="bench_throughput.py augment", description=__doc__.splitlines()[0])
    parser.add_argument("photos", nargs="?", help="a folder of images; by default synthetic ones")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--policy", default="v2", choices=[name for name, p in POLICIES.items() if p.crop_scale])
    parser.add_argument("--batch-size", type=positive, default=256 if cuda else 32)
    parser.add_argument("--size", type=positive, nargs="+", default=[224])
    parser.add_argument("--source-size", type=positive, default=256, help="pixels of a synthetic image's sides")
    parser.add_argument("--short-side", type=positive, help="of photographs, made smaller before; by default their own")
    parser.add_argument("--threads", type=positive, default=1, help="of the CPU")
    parser.add_argument("--rounds", type=int, default=30 if cuda else 7)
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    args = parser.parse_args(argv)
    device, dtype = torch.device(args.device), torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    policy, count = make_policy(args.policy), args.batch_size
    torch.set_num_threads(args.threads)
    if device.type == "cpu":
        keep_freed_memory()  # as training does
    batch = read_batch(args, device)
    speed, lines = copy_speed(device, args.rounds), []
    for size in args.size:
        contestants, missing = make_contestants(batch, policy, size, dtype)
        timings = time_calls(contestants, device, args.rounds)
        work = moved_bytes(batch, policy, size, dtype)
        part = moved_bytes(batch, part_policy(batch, policy, size), size, dtype) if PART[0] in contestants else work
        sources = f"{count} images of up to {batch.max_side} pixels"
        print(f"policy {args.policy}, {sources}, views of {size}, {work} bytes to move")
        for name, timing in timings.items():
            print_line(name, timing, count, (part if name in PART else work) / speed)
        for name, reason in missing.items():
            print(f"  {name:28} {reason}")
        seconds = {name: timing._asdict() for name, timing in timings.items()}
        lines.append({"size": size, "seconds": seconds, "not_measured": missing, "bytes": work})
    if args.output:
        sources = {"photos": bool(args.photos), "short_side": args.short_side, "max_side": batch.max_side}
        settings = {"policy": args.policy, "batch_size": count, **sources}
        result = {"environment": environment() | {"device": str(device)}, **settings, "copy": speed, "lines": lines}
        args.output.write_text(json.dumps(result, indent=1) + "\n")


def read_batch(args: argparse.Namespace, device: torch.device) -> ImageBatch:
    """The images to make views of: photographs, or synthetic ones."""
    count, size = args.batch_size, args.source_size
    if args.photos:
        return read_photos(args.photos, count, args.short_side).to(device)
    return next(SyntheticLoader(num_images=count, size=size, batch_size=count, seed=0, device=device).batches())


def print_line(name: str, timing, count: int, floor: float) -> None:
    """One contestant: time of a pair and its spread, pairs a second, share of the floor."""
    micro = [seconds / count * 1e6 for seconds in (timing.median, timing.low, timing.high)]
    print(
        f"  {name:28} {micro[0]:9.1f} us a pair ({micro[1]:.1f} to {micro[2]:.1f}), {1e6 / micro[0]:9.0f} pairs/s, "
        f"{100 * floor / timing.median:5.1f} % of the floor",
        flush=True,
    )
