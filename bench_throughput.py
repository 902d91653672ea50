"""Benchmarks: `python bench_throughput.py STAGE [options]`, or `--suite cpu|gpu`. The stages are in fastssl/bench/."""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib import import_module
from pathlib import Path

from fastssl.arguments import positive_float
from fastssl.command import refuse_word, run_command

STAGES = {  # stage: the module whose main(argv) measures it and writes JSON to --output
    "convert": "fastssl.bench.convert",
    "loader": "fastssl.bench.loader",
    "augment": "fastssl.bench.augment",
    "loss": "fastssl.bench.loss",
    "step": "fastssl.bench.step",
    "all": "fastssl.bench.whole_loop",
    "peers": "fastssl.bench.peers",
    "eval": "fastssl.bench.eval",
}
USAGE = f"""usage: python bench_throughput.py STAGE [options]     run one benchmark: {", ".join(STAGES)}
       python bench_throughput.py STAGE --help        list the options of a benchmark
       python bench_throughput.py --suite cpu|gpu     run all of them, in at most ten minutes
       python bench_throughput.py report [--check]    write (or check) the tables of the documentation from benchmarks/

options of every STAGE, besides its own:
  --output FILE        write the result as JSON
  --report DIR         write the result as JSON, as a table and as a plot to this folder (instead of --output)
  --compare OLD.json   compare with an earlier result: faster, slower or within the noise; exit with 1 if slower
  --seconds N          start no further round after N seconds, but run at least three
"""


def main(argv: list[str]) -> int:
    """Runs a stage, the suite, or the report; returns the exit code."""
    stage, *rest = argv or [""]
    if stage == "report":
        import_module("fastssl.bench.report").main(rest)
        return 0
    if stage in ("-h", "--help"):
        print(USAGE)
        return 0
    refuse_ranks()
    if stage.startswith("--suite"):
        return import_module("fastssl.bench.suite").main(argv)
    if not argv:
        sys.exit(USAGE)
    if stage not in STAGES:
        return refuse_word("stage", stage, [*STAGES, "report"])
    if {"-h", "--help"} & set(rest):
        print(USAGE)
        import_module(STAGES[stage]).main(rest)
    return run_stage(stage, rest)


def refuse_ranks() -> None:
    """Raises ValueError in one of several processes of torchrun, each of which would print and write its own result."""
    from fastssl.distributed import read_ranks

    if read_ranks()[1] > 1:
        log = "how fast several train, the log of `torchrun -m fastssl.train` says, in images/s of all of them"
        raise ValueError(f"a benchmark is of a single process: start it without torchrun; {log}")


def run_stage(stage: str, argv: list[str]) -> int:
    """Measures, prints the verdicts, writes the report and compares; returns the exit code.

    What was measured before an error or Ctrl-C is judged and reported as well.
    """
    from fastssl.bench import compare, results, timing
    from fastssl.data_prep.files import check_writable
    from fastssl.distributed import limit_threads

    results.begun()
    shared, own = shared_parser().parse_known_args(argv)
    old = results.read_result(shared.compare) if shared.compare else None
    old_rows = results.rows(stage, old, str(shared.compare)) if old else []  # raises errors before measuring
    compare.compare_with(old)
    timing.stop_after(shared.seconds or float("inf"))
    with tempfile.TemporaryDirectory() as scratch:
        output = shared.output or (shared.report or Path(scratch)) / f"{stage}.json"
        if output.is_dir():
            raise ValueError(f"{output} is a folder: give --output a file, or use --report {output}")
        check_writable(output, "--report" if shared.report else "--output")
        before = written(output)
        limit_threads()  # a stage's --threads goes before
        try:
            import_module(STAGES[stage]).main([*own, "--output", str(output)])
        finally:
            if written(output) != before:
                result = show(stage, output, report=bool(shared.report))
        if old is None:
            return 0
        lines, slower = compare.compare(old_rows, results.rows(stage, result))
        warnings = compare.differences(old, result)
        print("\n".join(lines + warnings))
        return int(slower and not warnings)


def written(path: Path) -> int | None:
    """When a file was written, in nanoseconds; None if there is none."""
    return path.stat().st_mtime_ns if path.exists() else None


def show(stage: str, output: Path, report: bool) -> dict[str, object]:
    """Prints the verdicts of a result and writes its report. Returns the result."""
    from fastssl.bench.report import write_report
    from fastssl.bench.results import read_result
    from fastssl.bench.verdicts import verdicts

    result = read_result(output)
    for verdict in verdicts(stage, result):
        print(f"verdict: {verdict}")
    if report:
        print(f"written: {', '.join(map(str, [output, *write_report(output, stage)]))}")
    return result


def shared_parser() -> argparse.ArgumentParser:
    """The options that every stage takes; abbreviated as well, or the stage would take them for its own."""
    parser = argparse.ArgumentParser(prog="bench_throughput.py", add_help=False)
    places = parser.add_mutually_exclusive_group()
    places.add_argument("--output", type=Path)
    places.add_argument("--report", type=Path)
    parser.add_argument("--compare", type=Path)
    parser.add_argument("--seconds", type=positive_float)
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
