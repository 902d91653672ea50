"""`bench_throughput.py loader`: our loaders, torchvision's, FFCV's and DALI's, on the same files and cores.

Every loader has a process of its own. They take turns, an epoch each, and each round starts with another loader, so
that whatever else the machine does affects all of them. A pair is an image of which two views are wanted.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from fastssl.arguments import ListParser, positive
from fastssl.bench.compare import announce
from fastssl.bench.loader_peers import CONTESTANTS, DECODES, Options
from fastssl.bench.loader_process import LoaderProcess, Round
from fastssl.bench.photos import check_same_images, train_folder
from fastssl.bench.results import RAW, write_result
from fastssl.bench.timing import in_turn, summarise
from fastssl.data_prep.find import find_images
from fastssl.machine.limits import usable_cores
from fastssl.plural import counted

PACKAGES = ("torch", "torchvision", "pillow", "llvmlite", "ffcv", "numba", "nvidia-dali-cuda120", "nvidia-dali-cuda130")
Result = tuple[dict[str, dict], dict[str, str]]  # {name: figures}, {name: why it was left out}


def measure(names: list[str], options: Options, rounds: int) -> Iterator[Result]:
    """Yields the result so far after each round, so that a run that is cut short keeps it."""
    processes = {name: LoaderProcess(name, options) for name in names}
    try:
        missing: dict[str, str] = {}
        first: dict[str, float] = {}
        for ask in (LoaderProcess.wait_for_import, LoaderProcess.start):  # all import at the same time
            for name in (name for name in names if name not in missing):
                try:
                    first[name] = ask(processes[name])
                except ValueError as error:  # a peer that is not installed, or cannot read these files
                    first.pop(name, None)
                    missing[name] = str(error).removeprefix(f"{name}: ").strip().splitlines()[-1]
        if not (running := list(first)):
            raise ValueError("; ".join(f"{name}: {why}" for name, why in missing.items()))
        measured: dict[str, list[Round]] = {name: [] for name in running}
        for turn, name in enumerate(in_turn(running, rounds), 1):
            measured[name].append(processes[name].round())
            if turn % len(running) == 0:
                yield {n: figures(n, measured[n], first[n], processes[n].memory()) for n in running}, missing
    finally:
        for process in processes.values():
            process.end()


def figures(name: str, rounds: list[Round], first_batch: float, memory: int) -> dict[str, object]:
    """The figures of one loader, for the JSON."""
    return {
        "pairs": rounds[0].pairs,
        "decodes_per_pair": DECODES.get(name, 1),
        "pairs_per_second": summarise([r.pairs / r.seconds for r in rounds])._asdict(),
        "cpu_ms_per_pair": summarise([r.cpu_seconds * 1e3 / r.pairs for r in rounds])._asdict(),
        "first_batch_seconds": first_batch,
        "extra_bytes": memory,
    }


def print_table(results: dict[str, dict], threads: int) -> None:
    """Prints a line for each loader, the fastest first."""
    raw = results.get(RAW, {}).get("cpu_ms_per_pair", {}).get("median")
    print(
        f"{'':26} {'CPU ms per pair':>22} {'pairs/s':>8} {'decodes/s':>9} {'per core':>8} {'of raw':>7} "
        f"{'1st batch':>9} {'memory':>8}"
    )
    for name, r in sorted(results.items(), key=lambda item: item[1]["cpu_ms_per_pair"]["median"]):
        cpu, rate = r["cpu_ms_per_pair"], r["pairs_per_second"]["median"]
        share = f"{100 * raw / cpu['median']:5.1f} %" if raw else ""
        print(
            f"{name:26} {cpu['median']:7.3f} ({cpu['low']:.3f}-{cpu['high']:.3f}) {rate:8.0f} "
            f"{rate * r['decodes_per_pair']:9.0f} {1e3 / cpu['median']:8.0f} {share:>7} "
            f"{r['first_batch_seconds']:7.2f} s {r['extra_bytes'] / 2**20:5.0f} MB"
        )
    print(
        f"with --threads {threads} (or workers) each; per core: pairs per second of CPU time; of raw: percent of "
        f"those of {RAW}"
    )


def main(argv: list[str]) -> None:
    """Measures, prints a table, and writes JSON with machine, versions and commit."""
    parser = ListParser(prog="bench_throughput.py loader", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("data", help="folder with JPEGs in <class>/ or train/<class>/")
    add("--beton", help="the same files as a .beton: fastssl prep beton DATA FILE --originals")
    add(
        "--only",
        nargs="+",
        choices=CONTESTANTS,
        default=list(CONTESTANTS),
        metavar="NAME",
        help=f"measure only these loaders, of: {'; '.join(CONTESTANTS)}",
    )
    add("--threads", type=positive, default=usable_cores(), help="threads or workers each (default all cores)")
    add("--batch-size", type=positive, default=64, help="images per batch (default 64)")
    add("--rounds", type=positive, default=5, help="epochs of each loader (default 5)")
    add("--output", type=Path, help="write the result to this JSON file")
    args = parser.parse_args(argv)
    options = Options(train_folder(args.data), args.beton, args.batch_size, args.threads)
    if (images := len(find_images(options.folder).paths)) < args.batch_size:
        raise ValueError(f"{options.folder} has {counted(images, 'image')}: use a --batch-size of at most {images}")
    if args.beton:
        check_same_images(options.folder, args.beton)
    announce({"options": options._asdict()})
    versions = {package: metadata.version(package) for package in PACKAGES if any(metadata.distributions(name=package))}
    for results, missing in measure(args.only, options, args.rounds):
        content = {"options": options._asdict(), "loaders": results, "left_out": missing}
        write_result(args.output, content, packages=versions, cores=usable_cores())
    print_table(results, args.threads)
    for name, why in missing.items():
        print(f"left out: {name} ({why})")
