"""`fastssl check-loader DATA`: do the loaders keep their contract on these images, on this machine?"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from fastssl.arguments import ListParser
from fastssl.conformance import faults, images, samples
from fastssl.conformance.case import Case
from fastssl.loaders.make import LOADERS

BY_RANKS = {
    "ranks share an epoch": images.check_shares,
    "order is one of the key": images.check_order,
    "starts anywhere": images.check_resume,
}
READ_FILES = [loader for loader in LOADERS if samples.reads_files(loader)]
FAULTS = {
    "decodes once a pair": faults.check_decoded_once,
    "50 early breaks": faults.check_breaks,
    "memory over 20 epochs": faults.check_memory,
    "ten loaders in turn": faults.check_many_loaders,
    "dead producer": faults.check_dead_producer,
}


def list_checks(
    loader: str, data: str, world_sizes: Sequence[int], steps: int, device: str, scratch: Path
) -> Iterator[tuple[str, Callable[[], str]]]:
    """(name, check) of all there is to check on one loader: on `data`, then on small sets drawn in `scratch`.

    Raises ValueError when the loader cannot read `data`.
    """
    ranks = math.lcm(*world_sizes)
    batch_size = ranks * -(-8 // ranks)
    given = Case(loader, data if samples.reads_files(loader) else None, device, batch_size, steps)
    for world_size in world_sizes:
        given.open(0, world_size).close()
        for name, check in BY_RANKS.items():
            for shuffle in ("full", "blocks"):
                words = f"{name}, {world_size} rank{'s' * (world_size > 1)}" + ", in blocks" * (shuffle == "blocks")
                yield words, partial(check, given._replace(shuffle=shuffle), world_size)
    yield "pixels", partial(images.check_pixels, given)
    small = Case(loader, samples.make_good(loader, scratch), device)
    odd = Case(loader, samples.make_odd(loader, scratch), device)
    bad = Case(loader, samples.make_bad(loader, scratch), device)
    yield "pixels of odd images", partial(images.check_pixels, odd)
    for name, check in FAULTS.items():
        yield name, partial(check, small)
    yield "unreadable images", partial(faults.check_bad, bad)


def run_check(name: str, check: Callable[[], str]) -> bool:
    """Runs one check and prints its line of the table."""
    start = time.perf_counter()
    try:
        found, said = "ok", check()
    except AssertionError as error:
        found, said = "FAILS", str(error) or "an assertion inside the loader"
    except (ValueError, RuntimeError, OSError) as error:
        found, said = "FAILS", f"{type(error).__name__}: {error}"
    print(f"  {name:46} {found:5} {time.perf_counter() - start:6.1f} s  {said}", flush=True)
    return found == "ok"


def check_loaders(args: argparse.Namespace) -> int:
    """Checks the loaders in turn; returns the number of checks that failed."""
    failed, checked = 0, 0
    for loader in args.loader or READ_FILES:
        with tempfile.TemporaryDirectory() as scratch:
            checks = list_checks(loader, args.data, args.world_sizes, args.steps, args.device, Path(scratch))
            try:
                first = next(checks)
            except ValueError as error:
                if args.loader:
                    raise
                print(f"{loader}: left out ({error})")
                continue
            print(f"{loader}:", flush=True)
            results = [run_check(*first), *(run_check(*check) for check in checks)]
            failed, checked = failed + results.count(False), checked + len(results)
    if not checked:
        raise ValueError(f"no loader can be checked on {args.data}: the lines above say why")
    print(f"{checked - failed} of {checked} checks passed")
    return failed


def main(argv: Sequence[str]) -> int:
    """Parses the flags, prints a table, returns 0 when everything holds and 1 when something does not."""
    parser = ListParser(prog="fastssl check-loader", description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder of images, .beton file or folder of shards")
    parser.add_argument("--loader", nargs="+", choices=LOADERS, help="which ones; by default all that can read DATA")
    parser.add_argument("--world-sizes", nargs="+", type=int, default=[1, 2, 4], help="numbers of ranks to check")
    parser.add_argument("--steps", type=int, default=32, help="most batches of DATA's epochs that are looked at")
    parser.add_argument("--device", default="cpu", help="where batches go")
    args = parser.parse_args(list(argv))
    if min(args.world_sizes) < 1 or args.steps < 2:
        raise ValueError("--world-sizes must be at least 1 and --steps at least 2")
    return int(check_loaders(args) > 0)
