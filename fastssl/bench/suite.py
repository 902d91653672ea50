"""`bench_throughput.py --suite cpu|gpu`: everything worth knowing about a machine, in minutes.

Each stage runs in a process of its own and has its share of the time. When that is over it starts no further round, and
well after that, or when it would take the shares of the next stages, it is killed; what it has measured until then is
on disk, since stages write their JSON line by line.
`suite-NAME.json` and the reports are written after each stage. The GPU suite first fills the compiler's cache, all
encoders at the same time, each in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fastssl.bench.photos import SOURCE, open_data, train_folder
from fastssl.bench.report import write_report
from fastssl.bench.results import begun, read_result, write_result
from fastssl.bench.suite_entries import Entry, Sizes, compile_ahead, cpu_entries, gpu_entries
from fastssl.bench.verdicts import verdicts
from fastssl.command import tidy_on_signals
from fastssl.data_prep.files import check_writable

PROGRAM = Path(__file__).resolve().parents[2] / "bench_throughput.py"
LIMIT = {"cpu": 580, "gpu": 520}  # seconds, so that all is done within ten and nine minutes
SLACK = 3.0  # a stage, which may have to compile first, is killed after this many times its share


class Done(NamedTuple):
    """How a stage of the suite ended."""

    name: str
    state: str  # done, killed, failed or left out
    seconds: float
    found: list[str]  # its verdicts, or why it failed


def main(argv: Sequence[str]) -> int:
    """Runs the stages and prints a summary. Returns exit code 1 if one of them failed or was killed."""
    args = parse(argv)
    begun()
    suffix = f"{args.suite}-tiny" if args.tiny else args.suite
    summary = args.report / f"suite-{suffix}.json"
    check_writable(summary, "--report")  # makes the folder
    if args.suite == "cpu":
        sizes, make_entries = Sizes.cpu(), cpu_entries
    else:
        sizes, make_entries = Sizes.gpu(), gpu_entries
    if args.tiny:
        sizes = Sizes.tiny()
    finish, done = time.monotonic() + LIMIT[args.suite], []
    with tidy_on_signals(), tempfile.TemporaryDirectory() as scratch:  # signals do not reach the stages' own sessions
        data, beton = open_data(args.data, args.beton, Path(scratch), sizes.photos)
        entries = make_entries(sizes, train_folder(data), beton)
        stages = {entry.stage for entry in entries}
        if unknown := set(args.only or ()) - stages:
            raise ValueError(f"--only takes {', '.join(sorted(stages))}, not {', '.join(sorted(unknown))}")
        if args.suite == "gpu":
            compile_all(sizes, finish)
        entries = [entry for entry in entries if not args.only or entry.stage in args.only]
        for i, entry in enumerate(entries):
            others = sum(later.seconds for later in entries[i + 1 :])  # whose shares it must leave
            done.append(run_entry(entry, args.report / f"{entry.name}-{suffix}.json", finish - others))
            save(summary, done, args.data or SOURCE)
    print_table(done)
    return int(any(one.state in ("killed", "failed") for one in done))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench_throughput.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--suite", choices=("cpu", "gpu"), required=True, help="stages and sizes for a CPU or a GPU")
    add("data", nargs="?", help=f"folder with JPEGs in class folders (default: {SOURCE})")
    add("--beton", help="the same files as a .beton (default: made from the folder)")
    add("--report", type=Path, help="folder for the results (default: runs/bench-SUITE-<time>)")
    add("--only", nargs="+", help="run only these stages")
    add("--tiny", action="store_true", help="the smallest sizes, on the CPU, to test the suite itself")
    args = parser.parse_args(argv)
    if args.suite == "gpu" and not args.tiny and not torch.cuda.is_available():
        parser.error("--suite gpu needs a CUDA device: use --suite cpu, or --tiny to test the suite on the CPU")
    args.report = args.report or Path("runs") / time.strftime(f"bench-{args.suite}-%Y%m%d-%H%M%S")
    return args


def compile_all(sizes: Sizes, finish: float) -> None:
    """Compiles all encoders at the same time. What is not done in time is compiled when it is measured."""
    running = [
        subprocess.Popen([sys.executable, str(PROGRAM), *argv], stdout=subprocess.DEVNULL, start_new_session=True)
        for argv in compile_ahead(sizes)
    ]
    limit = min(finish, time.monotonic() + sizes.compile_seconds)
    try:
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, limit - time.monotonic()))
    finally:
        for process in running:
            end_group(process)


def run_entry(entry: Entry, output: Path, finish: float) -> Done:
    """Runs one stage in a process of its own, shows its output, and reports what it measured, however it ended."""
    start = time.monotonic()
    limit = min(SLACK * entry.seconds, finish - start)
    if limit < entry.seconds / 4:
        return Done(entry.name, "left out", 0.0, ["no time was left"])
    output.unlink(missing_ok=True)
    command = [sys.executable, str(PROGRAM), entry.stage, *entry.argv, "--output", str(output)]
    print(f"\n== {entry.name}, {entry.seconds:.0f} s: {' '.join(command[1:])}", flush=True)
    seconds = min(entry.seconds, max(limit - entry.rest, limit / 4))
    process = subprocess.Popen([*command, "--seconds", f"{seconds:.0f}"], start_new_session=True)
    try:
        state = "done" if process.wait(limit) == 0 else "failed"
    except subprocess.TimeoutExpired:
        state = "killed"
    finally:
        end_group(process)
    found = [f"{state}: see its output above"] if state != "done" else []
    if output.exists():
        try:
            write_report(output, entry.stage)
            found += verdicts(entry.stage, read_result(output))
        except ValueError as error:  # it was killed while writing
            found.append(str(error))
    return Done(entry.name, state, time.monotonic() - start, found)


def end_group(process: subprocess.Popen) -> None:
    """Ends what is left of a stage, the workers of its loaders included."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def save(path: Path, done: Sequence[Done], images: str) -> None:
    """Writes the result of the suite and its page."""
    write_result(path, {"images": images, "lines": [one._asdict() for one in done]})
    write_report(path, "suite")


def print_table(done: Sequence[Done]) -> None:
    """Prints how each stage ended and what it found."""
    print("\n== the suite")
    for one in done:
        print(f"{one.name:24} {one.state:8} {one.seconds:5.0f} s")
        for sentence in one.found:
            print(f"  {sentence}")
