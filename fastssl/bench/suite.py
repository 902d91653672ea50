"""`bench_throughput.py --suite cpu|gpu`: everything worth knowing about a machine, in minutes, one process a stage.

Each stage has its share of the time: it begins no round after it, and is killed well after it. What it measured until
then is on the disk, since stages write their JSON line by line; `suite-NAME.json` and the reports are written after
each stage. The GPU suite first compiles all encoders at once, each in a process of its own, into the compiler's cache.
"""

from __future__ import annotations

import argparse
import contextlib
import json
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
from fastssl.bench.results import read_result
from fastssl.bench.suite_entries import Entry, Sizes, compile_ahead, cpu_entries, gpu_entries
from fastssl.bench.verdicts import verdicts
from fastssl.command import tidy_on_signals
from fastssl.environment import environment

PROGRAM = Path(__file__).resolve().parents[2] / "bench_throughput.py"
LIMIT = {"cpu": 580, "gpu": 520}  # seconds: within ten and nine minutes, starting and ending included
SLACK = 3.0  # times its share after which a stage is killed: it may first compile


class Done(NamedTuple):
    """How a stage of the suite ended."""

    name: str
    state: str  # done, killed, failed or left out
    seconds: float
    found: list[str]  # its verdicts, or why it failed


def main(argv: Sequence[str]) -> int:
    """Runs the stages, prints the short table last; exit code 1 when one of them failed or was killed."""
    args = parse(argv)
    folder, suffix = args.report, f"{args.suite}{'-tiny' * args.tiny}"
    folder.mkdir(parents=True, exist_ok=True)
    sizes = Sizes.tiny() if args.tiny else Sizes.cpu() if args.suite == "cpu" else Sizes.gpu()
    finish, done = time.monotonic() + LIMIT[args.suite], []
    with tidy_on_signals(), tempfile.TemporaryDirectory() as scratch:  # a stage has a session of its own: end it, too
        data, beton = open_data(args.data, args.beton, Path(scratch), sizes.photos)
        make = cpu_entries if args.suite == "cpu" else gpu_entries
        entries = make(sizes, train_folder(data), beton)
        stages = {entry.stage for entry in entries}
        if unknown := set(args.only or ()) - stages:
            raise ValueError(f"--only {' '.join(sorted(unknown))}: the suite has {', '.join(sorted(stages))}")
        if args.suite == "gpu":
            compile_all(sizes, finish)
        for entry in [entry for entry in entries if not args.only or entry.stage in args.only]:
            done.append(run_entry(entry, folder / f"{entry.name}-{suffix}.json", finish))
            save(folder / f"suite-{suffix}.json", done, args.data or SOURCE)
    print_table(done)
    return int(any(one.state in ("killed", "failed") for one in done))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench_throughput.py", description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=("cpu", "gpu"), required=True)
    parser.add_argument("data", nargs="?", help=f"folder of JPEGs in class folders; by default {SOURCE}")
    parser.add_argument("--beton", help="the same files as a .beton")
    parser.add_argument("--report", type=Path, help="folder for the results; by default runs/bench-SUITE-<time>")
    parser.add_argument("--only", nargs="+", help="these stages alone")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes on the CPU: whether the suite itself works")
    args = parser.parse_args(list(argv))
    if args.suite == "gpu" and not args.tiny and not torch.cuda.is_available():
        parser.error("--suite gpu needs a CUDA device; with --tiny it tries itself on the CPU")
    args.report = args.report or Path("runs") / time.strftime(f"bench-{args.suite}-%Y%m%d-%H%M%S")
    return args


def compile_all(sizes: Sizes, finish: float) -> None:
    """Runs the ahead-of-time compilations side by side. What is not done in time will be done when it is measured."""
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
    """One stage in a process of its own, its output shown; its result reported, however it ended."""
    start = time.monotonic()
    limit = min(SLACK * entry.seconds, finish - start)
    if limit < entry.seconds / 4:
        return Done(entry.name, "left out", 0.0, ["no time left"])
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
        except ValueError as error:  # killed while it wrote
            found.append(str(error))
    return Done(entry.name, state, time.monotonic() - start, found)


def end_group(process: subprocess.Popen) -> None:
    """Ends what is left of a stage: loaders have workers of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def save(path: Path, done: Sequence[Done], images: str) -> None:
    """The suite's own result and its page."""
    result = {"environment": environment(), "images": images, "lines": [one._asdict() for one in done]}
    path.write_text(json.dumps(result, indent=1) + "\n")
    write_report(path, "suite")


def print_table(done: Sequence[Done]) -> None:
    """What each stage found, in a line or two."""
    print("\n== the suite")
    for one in done:
        print(f"{one.name:24} {one.state:8} {one.seconds:5.0f} s")
        for sentence in one.found:
            print(f"  {sentence}")
