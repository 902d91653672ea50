"""`bench_throughput.py eval`: k-NN by our code and the reference project's way, and what a cached linear sweep costs.

The features are drawn at random around cluster centres; all contestants take turns in one process.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastssl.arguments import positive
from fastssl.bench.compare import announce
from fastssl.bench.device import CPU
from fastssl.bench.knn_peer import knn_the_reference_way, nearest_by_cdist
from fastssl.bench.results import write_result
from fastssl.bench.timing import Function, Timing, read_in_turn, stopwatch, summarise_all, time_calls
from fastssl.distributed import Ranks
from fastssl.eval.linear_cached import Setting, Sweep, fit_linear
from fastssl.eval.memory import Memory
from fastssl.eval.search import knn_over_ranks
from fastssl.eval.vote import odd_ks

CLASSES = 10
REFERENCE, LEAN, OURS = "reference's way", "cdist and topk, no vote", "ours"
SWEPT = [Setting(lr, wd) for lr, wd in product((0.1, 0.3, 1.0, 3.0, 10.0, 30.0), (0.0, 1e-6))]
SIZES = {"knn": ("bank", "queries", "dim", "k", "batch_size", "max_mem_gb"), "sweep": ("bank", "dim", "epochs")}
ONE, TWELVE = "one setting", f"{len(SWEPT)} settings"


def make_features(num: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """(num, dim) float32 rows of unit length around ten centres, and their labels (num,) int64."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (num,), generator=generator)
    centres = torch.randn(CLASSES, dim, generator=torch.Generator().manual_seed(CLASSES)) / 4
    return normalize(centres[labels] + torch.randn(num, dim, generator=generator), dim=1), labels


def setting(args: argparse.Namespace, what: str) -> dict[str, object]:
    """The beginning of a line of the result: what is measured, with its sizes."""
    return {"what": what, **{name: getattr(args, name) for name in SIZES[what]}}


def take_turns(contestants: dict[str, Function], rounds: int) -> dict[str, Timing]:
    """As `time_calls` on a CPU, without the call before the first round, which would take minutes."""
    return summarise_all(read_in_turn({name: stopwatch(f) for name, f in contestants.items()}, rounds))


def measure_knn(args: argparse.Namespace) -> dict[str, object]:
    """The seconds of each contestant, and the largest difference between our accuracies and the reference's."""
    bank, (queries, labels) = make_features(args.bank, args.dim, 0), make_features(args.queries, args.dim, 1)
    ks, cap = odd_ks(args.k), Memory(args.max_mem_gb, CPU)
    answers: dict[str, dict[int, float]] = {}
    tally: Counter = Counter()

    def ours(num: int) -> None:
        found = knn_over_ranks(*bank, queries[:num], labels[:num], ks, Ranks(0, 1, CPU), cap)
        answers[OURS] = found.majority
        tally.update(found.search)

    def reference(num: int) -> None:
        answers[REFERENCE] = knn_the_reference_way(*bank, queries[:num], labels[:num], ks, args.batch_size)

    def lean(num: int) -> None:
        nearest_by_cdist(bank[0], queries[:num], args.k, 16384)

    contestants = {REFERENCE: reference, LEAN: lean, OURS: ours}
    for contestant in contestants.values():
        contestant(16)  # compiles, with few queries since the slowest contestant takes minutes
    tally.clear()
    timings = take_turns({name: partial(f, args.queries) for name, f in contestants.items()}, args.rounds)
    differ = max(abs(answers[OURS][k] - answers[REFERENCE][k]) for k in ks)
    return {
        **setting(args, "knn"),
        "seconds": {name: timing._asdict() for name, timing in timings.items()},
        "largest_difference_in_percent": differ,
        "search": dict(tally),
        **{f"times {name}": timings[name].median / timings[OURS].median for name in (REFERENCE, LEAN)},
    }


def measure_sweep(args: argparse.Namespace) -> dict[str, object]:
    """The seconds that --epochs epochs take for one setting, and for twelve settings trained together."""
    features, labels = make_features(args.bank, args.dim, 0)
    sweep = Sweep(epochs=args.epochs)
    fit = partial(fit_linear, features, labels, CLASSES)
    timings = time_calls({ONE: partial(fit, SWEPT[:1], sweep), TWELVE: partial(fit, SWEPT, sweep)}, CPU, args.rounds)
    return {
        **setting(args, "sweep"),
        "seconds": {name: timing._asdict() for name, timing in timings.items()},
        "twelve by one": timings[TWELVE].median / timings[ONE].median,
    }


def print_line(line: dict[str, object]) -> None:
    """Prints the timings and, in one line, what they mean."""
    for name, timing in line["seconds"].items():
        timing = Timing(**timing)
        print(f"  {name:26} {timing.median:8.3f} s ({timing.low:.3f} to {timing.high:.3f})", flush=True)
    if line["what"] == "knn":
        print(
            f"k-NN is {line[f'times {REFERENCE}']:.1f} times as fast as the reference's way and "
            f"{line[f'times {LEAN}']:.1f} times as fast as cdist and topk alone; accuracies differ by at most "
            f"{line['largest_difference_in_percent']:.2g} percentage points"
        )
    else:
        print(f"{TWELVE} take {line['twelve by one']:.2f} times as long as one")


def main(argv: Sequence[str]) -> None:
    """Measures, prints, and writes JSON with versions and commit."""
    parser = argparse.ArgumentParser(prog="bench_throughput.py eval", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--what", choices=("knn", "sweep"), nargs="+", default=["knn", "sweep"], help="what to measure (both)")
    add("--bank", type=positive, default=50_000, help="number of training features (default 50000)")
    add("--queries", type=positive, default=10_000, help="number of features to classify (default 10000)")
    add("--dim", type=positive, default=512, help="feature dimension (default 512)")
    add("-k", type=positive, default=101, help="largest k; all odd ones up to it (default 101)")
    add("--batch-size", type=positive, default=512, help="batch size of the reference's way (default 512)")
    add("--max-mem-gb", type=float, help="memory limit of our search")
    add("--epochs", type=positive, default=2, help="epochs of the sweep (default 2)")
    add("--rounds", type=positive, default=3, help="measurements of each contestant (default 3)")
    add("--threads", type=positive, help="CPU threads (default all cores)")
    add("--output", type=Path, help="write the result to this JSON file")
    args = parser.parse_args(argv)
    if args.k > args.bank:
        raise ValueError(f"-k {args.k} must not exceed the number of training features, --bank {args.bank}")
    if args.threads:
        torch.set_num_threads(args.threads)
    announce({"lines": [setting(args, what) for what in args.what]})
    measure = {"knn": measure_knn, "sweep": measure_sweep}
    lines = []
    for what in args.what:
        lines.append(measure[what](args))
        print_line(lines[-1])
        write_result(args.output, {"lines": lines})
