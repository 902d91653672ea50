"""`fastssl check-loader DATA`: checks that the loaders keep their contract (`loaders/make.py`) on these images."""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from fastssl.arguments import ListParser
from fastssl.conformance import faults, images, samples
from fastssl.conformance.case import Case
from fastssl.distributed import means_cuda
from fastssl.loaders.choose import LOADERS
from fastssl.plural import counted

RANK_CHECKS = {  # for each number of ranks
    "ranks share an epoch": images.check_shares,
    "order depends on the seed": images.check_order,
    "can start at any batch": images.check_resume,
}
FAULT_CHECKS = {
    "decodes each pair once": faults.check_decoded_once,
    "50 loops left early": faults.check_breaks,
    "memory over 20 epochs": faults.check_memory,
    "ten loaders in turn": faults.check_many_loaders,
    "death of its thread": faults.check_dead_producer,
}
FILE_LOADERS = [loader for loader in LOADERS if samples.reads_files(loader)]


def list_checks(
    loader: str, data: str, world_sizes: Sequence[int], steps: int, device: str, scratch: Path
) -> Iterator[tuple[str, Callable[[], str]]]:
    """All (name, check) pairs for one loader: on `data`, then on small data sets drawn in the folder `scratch`.

    Raises ValueError when the loader cannot read `data`.
    """
    ranks = math.lcm(*world_sizes)
    batch_size = ranks * math.ceil(8 / ranks)  # at least 8, and a multiple of every world size
    given = Case(loader, data if samples.reads_files(loader) else None, device, batch_size, steps)
    with closing(given.open(batch_size=1)) as opened:
        if opened.num_images < batch_size:
            images_there = counted(opened.num_images, "image")
            raise ValueError(f"{data} has {images_there}, and the checks need {batch_size} for these --world-sizes")
    for world_size in world_sizes:
        given.open(0, world_size).close()
        for name, check in RANK_CHECKS.items():
            name = f"{name}, {counted(world_size, 'rank')}"
            yield name, partial(check, given, world_size)
            yield f"{name}, in blocks", partial(check, given._replace(shuffle="blocks"), world_size)
    yield "pixels", partial(images.check_pixels, given)
    small = Case(loader, samples.make_good(loader, scratch), device)
    odd = Case(loader, samples.make_odd(loader, scratch), device)
    bad = Case(loader, samples.make_bad(loader, scratch), device)
    yield "pixels of odd images", partial(images.check_pixels, odd)
    for name, check in FAULT_CHECKS.items():
        yield name, partial(check, small)
    yield "unreadable images", partial(faults.check_bad, bad)


def run_check(name: str, check: Callable[[], str]) -> bool:
    """Runs one check and prints its line of the table; returns whether it passed."""
    start = time.perf_counter()
    try:
        result, details = "ok", check()
    except AssertionError as error:
        result, details = "FAILS", str(error) or "an assertion inside the loader"
    except (ValueError, RuntimeError, OSError) as error:
        result, details = "FAILS", f"{type(error).__name__}: {error}"
    print(f"  {name:46} {result:5} {time.perf_counter() - start:6.1f} s  {details}", flush=True)
    return result == "ok"


def check_loaders(args: argparse.Namespace) -> int:
    """Checks the loaders one after another; returns the number of failed checks."""
    failed, checked, all_checks = 0, 0, {}
    with tempfile.TemporaryDirectory() as scratch:
        for loader in args.loader or FILE_LOADERS:  # all are opened before the first check
            (place := Path(scratch, loader)).mkdir(exist_ok=True)
            checks = list_checks(loader, args.data, args.world_sizes, args.steps, args.device, place)
            try:
                all_checks[loader] = itertools.chain([next(checks)], checks)
            except ValueError as error:
                if args.loader:
                    raise
                print(f"{loader}: skipped ({error})")
        for loader, checks in all_checks.items():
            print(f"{loader}:", flush=True)
            results = [run_check(*check) for check in checks]
            failed, checked = failed + results.count(False), checked + len(results)
    if not checked:
        raise ValueError(f"no loader can read {args.data}; the lines above say why")
    print(f"{checked - failed} of {checked} checks passed")
    return failed


def main(argv: Sequence[str]) -> int:
    """Prints the table; returns 0 when every check passes and 1 otherwise."""
    parser = ListParser(
        prog="fastssl check-loader",
        description="Check that the loaders keep their contract on these images, on this machine.",
    )
    parser.add_argument("data", help="a folder of images, a .beton file or a folder of shards")
    parser.add_argument("--loader", nargs="+", choices=LOADERS, help="loaders to check (default: all that read DATA)")
    parser.add_argument("--world-sizes", nargs="+", type=int, default=[1, 2, 4],
                        help="numbers of ranks to check with (default: 1 2 4)")  # fmt: skip
    parser.add_argument("--steps", type=int, default=32, help="batches read per epoch, at most (default: 32)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the batches go (default: cpu)")
    args = parser.parse_args(list(argv))
    means_cuda(args.device)  # raises the error
    if min(args.world_sizes) < 1 or args.steps < 2:
        raise ValueError("--world-sizes must be at least 1 and --steps at least 2")
    return int(check_loaders(args) > 0)
