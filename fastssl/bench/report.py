"""`bench_throughput.py report`: writes the tables of the READMEs from the JSON files in benchmarks/.

Everything between `<!-- table: NAME.json -->` and `<!-- end of table -->` is replaced by the table of that result; the
table `index` lists all results. `--report DIR` of any stage writes such a page beside its JSON, with a plot.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from fastssl.bench.loop_verdicts import shares
from fastssl.bench.plot import plot
from fastssl.bench.results import RAW, Row, loop_rows, read_result, rows, spread, stage_of
from fastssl.bench.verdicts import verdicts
from fastssl.data_prep.files import write_text
from fastssl.plural import counted

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "kernels/README.md", "benchmarks/README.md")
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
INDEX = "index"  # the name of the table of all results
PARTS = ("augmentation", "encoders", "loss", "optimiser + EMA + queue")


def main(argv: Sequence[str]) -> None:
    """Rewrites the tables; with --check, only says which pages are out of date."""
    parser = argparse.ArgumentParser(prog="bench_throughput.py report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only check: exit with 1 if a page is out of date")
    args = parser.parse_args(list(argv))
    stale = []
    for page in (ROOT / name for name in PAGES if (ROOT / name).exists()):
        text = page.read_text()
        if (fresh := fill(text)) != text:
            stale.append(str(page.relative_to(ROOT)))
            if not args.check:
                write_text(page, fresh)
    print(f"{'out of date' if args.check else 'rewritten'}: {', '.join(stale) or 'none'}")
    if args.check and stale:
        raise SystemExit(1)


def fill(text: str) -> str:
    """The text of a page with new tables. Raises ValueError for a table whose JSON does not exist."""

    def table(match: re.Match) -> str:
        if match[2] == INDEX:
            return f"{match[1]}{index_table()}\n{match[3]}"
        path = ROOT / "benchmarks" / match[2]
        if not path.exists():
            raise ValueError(f"a page has a table of {path}, which does not exist: measure it, or remove the table")
        return f"{match[1]}{result_table(path, stage_of(path))}\n{match[3]}"

    return BLOCK.sub(table, text)


def where(environment: dict) -> str:
    """The line above a table: command, machine, version of torch, commit, date."""
    return (
        f"`{shlex.join(['python', *environment['command']])}` on {machine(environment)}, torch {environment['torch']}, "
        f"commit {str(environment['commit'])[:8]}, {environment['started'][:10]}:"
    )


def machine(environment: dict) -> str:
    """The GPUs, and how many threads of which CPU: a result may need either, or both."""
    threads = counted(environment["threads"], "CPU thread")
    names = [environment[name] for name in ("cpu", "cpu_instructions") if name in environment]
    return ", ".join([*environment["gpus"], f"{threads} ({', '.join(names)})" if names else threads])


def as_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows])


def loss_table(lines: Sequence[dict]) -> str:
    """One row for each shape; the last contestant is ours."""
    rows = []
    for line in lines:
        seconds, extra, floor = line["seconds"], line["extra_bytes"], line["percent_of_floor"]
        *others, ours = seconds
        median, low, high = (seconds[ours][key] for key in ("median", "low", "high"))
        times_eager = f"{seconds['eager float32']['median'] / median:.1f}"
        mib = f"{extra['eager float32'] / 2**20:.0f}", f"{extra[ours] / 2**20:.1f}"
        medians = [ms(seconds[name]["median"]) for name in others] + [f"{ms(median)} ({ms(low)} to {ms(high)})"]
        setting = [line["terms"], line["num"], line["queue_size"]]
        rows.append([*setting, *medians, times_eager, f"{floor[ours]:.0f}", *mib])
    names = [f"{name}, ms" for name in lines[0]["seconds"]]
    tail = ["times eager", "% of the floor", "eager, extra MiB", "ours, extra MiB"]
    return as_table(["terms", "N", "K", *names, *tail], rows)


def ms(seconds: float) -> str:
    """Milliseconds with three digits and no exponent."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def step_table(lines: Sequence[dict]) -> str:
    """One row for each architecture: the rate of the step, that of the eager step, their parts and the floor."""
    rows = []
    for line in lines:
        found, settings, floor = {row.name: row for row in loop_rows(line)}, line["settings"], line["floor"]
        step, eager, parts = found["step"], found.get("eager step"), shares(line["parts"])
        seconds = settings["batch_size"] / step.value.median
        rows.append(
            [
                *(settings["arch"], settings["image_size"], settings["batch_size"], spread(step.value)),
                *((spread(eager.value), spread(step.times)) if eager else ("not measured", "not measured")),
                *(f"{parts[name]:.0%}" for name in PARTS),
                *(f"{floor[name] / seconds:.0%}" for name in ("arithmetic_seconds", "memory_seconds")),
            ]
        )
    head = ["encoder", "pixels", "batch", "step, pairs/s", "eager step, pairs/s", "times the eager step"]
    return as_table([*head, *PARTS, "arithmetic floor / step", "memory floor / step"], rows)


def loop_table(lines: Sequence[dict]) -> str:
    """One row for each loop, the fastest first: pairs of views per second, and how many times faster than the peer."""
    rows = []
    for line in lines:
        arch = line["settings"]["arch"]
        for row in sorted(loop_rows(line), key=lambda row: -row.value.median):
            rows.append([arch, row.name, spread(row.value), spread(row.times)])
        for name, reason in line.get("not_measured", {}).items():
            rows.append([arch, name, "not measured", reason])
    return as_table(["encoder", "loop", "pairs/s", f"times {lines[0]['beside']!r}"], rows)


def suite_table(lines: Sequence[dict]) -> str:
    """One row for each stage: how it ended, and its verdicts."""
    rows = [[line["name"], f"{line['state']} after {line['seconds']:.0f} s", " ".join(line["found"])] for line in lines]
    return as_table(["stage", "ended", "verdict"], rows)


def rows_table(found: Sequence[Row]) -> str:
    """For any result: one row for each contestant in each setting."""
    return as_table(
        ["setting", "contestant", "median (tenth to ninetieth percentile)"],
        [[row.group, row.name, f"{spread(row.value)} {row.unit}"] for row in found],
    )


def loader_table(result: dict) -> str:
    """One row for each loader, the least CPU time first; without shares if the bare decoder was left out."""
    loaders = result["loaders"]
    bare = loaders[RAW]["cpu_ms_per_pair"]["median"] if RAW in loaders else None
    rows = []
    for name, line in sorted(loaders.items(), key=lambda item: item[1]["cpu_ms_per_pair"]["median"]):
        cpu, rate = line["cpu_ms_per_pair"], f"{line['pairs_per_second']['median']:,.0f}"
        time = f"{cpu['median']:.3f} ({cpu['low']:.3f} to {cpu['high']:.3f})"
        share = f"{100 * bare / cpu['median']:,.0f} %" if bare else "not measured"
        rows.append([name, time, rate, share, f"{line['first_batch_seconds']:.2f}"])
    return as_table(["loader", "CPU ms a pair", "pairs/s", "of the bare decoder's, per core", "first batch, s"], rows)


LAYOUTS: dict[str, Callable[..., str]] = {
    "loss": loss_table,
    "step": step_table,
    "all": loop_table,
    "peers": loop_table,
    "suite": suite_table,
    "loader": loader_table,
}


def result_table(path: Path, stage: str) -> str:
    """The line that says where a result comes from, its table and its verdicts."""
    result = read_result(path)
    table = LAYOUTS[stage](result.get("lines", result)) if stage in LAYOUTS else rows_table(rows(stage, result))
    parts = [where(result["environment"]), table]
    if found := verdicts(stage, result):
        parts.append("\n".join(f"- {verdict}" for verdict in found))
    return "\n\n".join(parts)


def write_report(path: Path, stage: str) -> list[Path]:
    """Writes NAME.md beside a result NAME.json, and NAME.png if there is something to draw; returns what it wrote."""
    page, picture, result = path.with_suffix(".md"), path.with_suffix(".png"), read_result(path)
    text = f"# {path.stem}\n\n{result_table(path, stage)}\n"
    found = rows(stage, result) if stage != "suite" else []
    if found:
        plot(found, where(result["environment"]).replace("`", ""), picture)
        text += f"\n![{path.stem}]({picture.name})\n"
    write_text(page, text)
    return [page, picture] if found else [page]


def index_table() -> str:
    """The results in benchmarks/: file, machine, commit, date, command."""
    lines = []
    for path in sorted((ROOT / "benchmarks").glob("*.json")):
        e = read_result(path)["environment"]
        command = f"`{shlex.join(['python', *e['command']])}`"
        lines.append([f"[{path.name}]({path.name})", machine(e), str(e["commit"])[:8], e["started"][:10], command])
    return as_table(["file", "measured on", "commit", "date", "command"], lines)
