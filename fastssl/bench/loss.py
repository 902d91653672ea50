"""`bench_throughput.py loss`: the loss and its gradient, by our code and by the published formulas, eager and compiled.

Every line is a batch size and a queue size, with forward and gradient at q of the weighted sum. The floor is the time
of the matrix products, or of reading the queue, at the rates of a large product and a large copy in the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.arguments import positive
from fastssl.bench.compare import announce
from fastssl.bench.device import open_device, silence_profiler, wait
from fastssl.bench.results import write_result
from fastssl.bench.timing import Function, time_in_turn
from fastssl.kernels.reference import align_reference, contrast_reference, uniform_reference
from fastssl.losses import LossConfig, choose_kernel, moco_loss

TERMS = {
    "all": LossConfig(contrast_weight=1.0),
    "align-uniform": LossConfig(),
    "contrast": LossConfig(contrast_weight=1.0, align_weight=0.0, uniform_weight=0.0),
}


def published_loss(q: Tensor, k: Tensor, queue: Tensor, config: LossConfig) -> Tensor:
    """The weighted sum by the plain formulas, each tensor in its own dtype."""
    total = 0.0
    if config.contrast_weight:
        total += config.contrast_weight * contrast_reference(q, k, queue, config.temperature)[0]
    if config.align_weight:
        total += config.align_weight * align_reference(q, k, config.align_alpha)
    if config.uniform_weight:
        total += config.uniform_weight * uniform_reference(q, queue, config.uniform_t, config.intra_batch)
    return total


def peak_extra_bytes(function: Function, device: torch.device) -> int:
    """The peak memory of tensors during one call, beyond what they held before it."""
    function()
    if device.type == "cuda":
        wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    silence_profiler()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        function()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held, peak = 0, 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def our_loss(q: Tensor, k: Tensor, queue: Tensor, config: LossConfig) -> Tensor:
    """The weighted sum by the product's fastest implementation for the device."""
    return moco_loss(q, k, queue, config).total


def make_contestants(
    num: int, queue_size: int, dim: int, config: LossConfig, device: torch.device, compiled: bool
) -> dict[str, Function]:
    """{name: a call that computes the loss and its gradient at q}."""
    generator = torch.Generator().manual_seed(0)
    q, k, queue = (
        F.normalize(torch.randn(rows, dim, generator=generator), dim=1).to(device) for rows in (num, num, queue_size)
    )

    def contestant(loss: Callable[..., Tensor], dtype: torch.dtype, queue_dtype: torch.dtype) -> Function:
        leaf, key, rows = q.to(dtype, copy=True).requires_grad_(), k.to(dtype), queue.to(queue_dtype)
        return lambda: torch.autograd.grad(loss(leaf, key, rows, config), leaf)

    single, low = torch.float32, torch.bfloat16
    compiled_loss = torch.compile(published_loss, fullgraph=True, dynamic=False)
    contestants = {"eager float32": contestant(published_loss, single, single)}
    if compiled:
        contestants["compiled float32"] = contestant(compiled_loss, single, single)
    if compiled and device.type == "cuda":
        contestants["compiled bfloat16"] = contestant(compiled_loss, low, low)
    contestants["ours, float32 queue"] = contestant(our_loss, single, single)
    if device.type == "cuda":
        contestants["ours, bfloat16 queue"] = contestant(our_loss, single, low)
    return contestants


def make_ceilings(device: torch.device, dtype: torch.dtype | None = None) -> dict[str, tuple[Function, float]]:
    """{name: (a call, its work)}: a large matrix product and its operations, a large copy and its bytes.

    dtype: of the product; by default that of the loss, bf16 on a GPU and float32 on a CPU.
    """
    on_gpu = device.type == "cuda"
    size, dtype = 8192 if on_gpu else 2048, dtype or (torch.bfloat16 if on_gpu else torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(2**30 if on_gpu else 2**27, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    copy = partial(target.copy_, source)
    return {"matmul": (partial(torch.mm, a, b), 2.0 * size**3), "copy": (copy, 2.0 * source.numel())}


def dot_products(num: int, queue_size: int, config: LossConfig) -> int:
    """The dot products of rows in all matrix products: with the queue, those and a weighted sum for either loss.

    Inside the batch, where only uniform looks, they and a single sum.
    """
    sums = (config.contrast_weight > 0) + (config.uniform_weight > 0)
    inside = 2 * num * num if config.uniform_weight and config.intra_batch else 0
    return (1 + sums) * num * queue_size + inside


def measure(
    num: int, queue_size: int, dim: int, terms: str, device: torch.device, rounds: int, compiled: bool
) -> dict[str, object]:
    """One line of the result: the seconds, extra bytes and percent of the floor of each contestant."""
    config = TERMS[terms]
    torch.compiler.reset()  # so that every shape is compiled for itself
    contestants = make_contestants(num, queue_size, dim, config, device, compiled)
    ceilings = make_ceilings(device)
    extra = {name: peak_extra_bytes(function, device) for name, function in contestants.items()}
    timings = time_in_turn(contestants | {name: f for name, (f, _) in ceilings.items()}, device, rounds)
    per_second = {name: work / timings.pop(name).median for name, (_, work) in ceilings.items()}
    itemsize = 2 if device.type == "cuda" else 4
    floor = max(
        2 * dim * dot_products(num, queue_size, config) / per_second["matmul"],
        (queue_size * itemsize + 3 * num * 4) * dim / per_second["copy"],
    )
    return {
        "num": num,
        "queue_size": queue_size,
        "dim": dim,
        "terms": terms,
        "seconds": {name: timing._asdict() for name, timing in timings.items()},
        "extra_bytes": extra,
        "percent_of_floor": {name: 100 * floor / timing.median for name, timing in timings.items()},
        "floor_seconds": floor,
        "matmul_per_second": per_second["matmul"],
        "copy_bytes_per_second": per_second["copy"],
    }


def print_line(line: dict[str, object]) -> None:
    """Prints one line of the result."""
    print(f"N = {line['num']}, K = {line['queue_size']}, D = {line['dim']}, {line['terms']} terms:", end=" ")
    print(f"floor {line['floor_seconds'] * 1e3:.3f} ms")
    eager = line["seconds"]["eager float32"]["median"]
    for name, timing in line["seconds"].items():
        spread = f"{timing['low'] * 1e3:.3f} to {timing['high'] * 1e3:.3f}"
        print(
            f"  {name:22} {timing['median'] * 1e3:9.3f} ms ({spread}), {eager / timing['median']:5.1f} x eager, "
            f"{line['percent_of_floor'][name]:5.1f} % of the floor, {line['extra_bytes'][name] / 2**20:8.1f} MiB extra",
            flush=True,
        )


def main(argv: list[str]) -> None:
    """Measures, prints, and writes JSON with device, versions and commit."""
    cuda = torch.cuda.is_available()
    nums = [256, 512, 1024, 4096] if cuda else [256, 512]
    parser = argparse.ArgumentParser(prog="bench_throughput.py loss", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", default="cuda" if cuda else "cpu", help="device (default: the GPU if there is one)")
    add("--num", type=positive, nargs="+", default=nums, help="batch sizes (default %(default)s)")
    add("--queue-size", type=positive, nargs="+", default=[4096, 16384, 65536], help="queue rows (default %(default)s)")
    add("--dim", type=positive, default=128, help="feature dimension (default 128)")
    add("--terms", choices=TERMS, nargs="+", default=["all"], help="terms of the loss (default all)")
    add("--rounds", type=positive, default=30 if cuda else 7, help="measurements of each (default %(default)s)")
    add("--no-compiled", action="store_true", help="leave out the compiled formulas")
    add("--threads", type=positive, help="CPU threads (default all cores)")
    add("--output", type=Path, help="write the result to this JSON file")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = open_device(args.device)
    kernel = choose_kernel(device, torch.bfloat16 if device.type == "cuda" else torch.float32, args.dim)
    lines, shapes = [], list(product(args.terms, args.num, args.queue_size))
    announce({"lines": [{"num": n, "queue_size": k, "dim": args.dim, "terms": terms} for terms, n, k in shapes]})
    for terms, num, queue_size in shapes:
        lines.append(measure(num, queue_size, args.dim, terms, device, args.rounds, not args.no_compiled))
        print_line(lines[-1])
        settings = {name: asdict(TERMS[name]) for name in args.terms}
        write_result(args.output, {"kernel": kernel, "lines": lines, "terms": settings}, device=str(device))
