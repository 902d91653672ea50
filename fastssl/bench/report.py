"""`bench_throughput.py report`: writes the tables of the READMEs from the JSON under benchmarks/, so none can drift.

A table stands between `<!-- table: NAME.json -->` and `<!-- end of table -->`; what is between them is replaced. The
table `index` lists all results. `--report DIR` of any stage writes the same beside its JSON, with a plot.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from fastssl.bench.plot import plot
from fastssl.bench.results import Row, loop_rows, read_result, rows, spread, stage_of
from fastssl.bench.verdicts import shares, verdicts

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "kernels/README.md", "benchmarks/README.md")
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
INDEX = "index"  # the name of the table of all results
PARTS = ("augmentation", "encoders", "loss", "optimiser + EMA + queue")


def main(argv: Sequence[str]) -> None:
    """Rewrites the tables, or says with --check which pages are out of date."""
    parser = argparse.ArgumentParser(prog="bench_throughput.py report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail when a page is out of date")
    args = parser.parse_args(list(argv))
    stale = []
    for page in (ROOT / name for name in PAGES if (ROOT / name).exists()):
        text = page.read_text()
        if (fresh := fill(text)) != text:
            stale.append(str(page.relative_to(ROOT)))
            if not args.check:
                page.write_text(fresh)
    print(f"{'out of date' if args.check else 'rewritten'}: {', '.join(stale) or 'none'}")
    if args.check and stale:
        raise SystemExit(1)


def fill(text: str) -> str:
    """The page with every table made anew. Raises ValueError for a table whose JSON does not exist."""

    def table(match: re.Match) -> str:
        if match[2] == INDEX:
            return f"{match[1]}{index_table()}\n{match[3]}"
        path = ROOT / "benchmarks" / match[2]
        if not path.exists():
            raise ValueError(f"a page shows a table of {path}, which does not exist")
        return f"{match[1]}{result_table(path, stage_of(path))}\n{match[3]}"

    return BLOCK.sub(table, text)


def where(environment: dict) -> str:
    """The line over a table: command, machine, versions, commit, date."""
    cpu = f"{environment['threads']} CPU thread(s) of {environment.get('cpu', 'a CPU')}"
    device = ", ".join(environment["gpus"]) or cpu
    return (
        f"`python {' '.join(environment['command'])}` on {device}, torch {environment['torch']}, "
        f"commit {str(environment['commit'])[:8]}, {environment['started'][:10]}:"
    )


def as_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows])


def loss_table(lines: Sequence[dict]) -> str:
    """One row for each shape; the last of the contestants is ours."""
    rows = []
    for line in lines:
        seconds, extra, floor = line["seconds"], line["extra_bytes"], line["percent_of_floor"]
        ours = list(seconds)[-1]
        others = [f"{ms(seconds[name]['median'])}" for name in list(seconds)[:-1]]
        spread = f"{ms(seconds[ours]['low'])} to {ms(seconds[ours]['high'])}"
        rows.append(
            [line["terms"], line["num"], line["queue_size"], *others]
            + [f"{ms(seconds[ours]['median'])} ({spread})"]
            + [f"{seconds['eager float32']['median'] / seconds[ours]['median']:.1f}", f"{floor[ours]:.0f}"]
            + [f"{extra['eager float32'] / 2**20:.0f}", f"{extra[ours] / 2**20:.1f}"]
        )
    names = [f"{name}, ms" for name in lines[0]["seconds"]]
    tail = ["times eager", "% of the floor", "eager extra MiB", "ours"]
    return as_table(["terms", "N", "K", *names, *tail], rows)


def ms(seconds: float) -> str:
    """Milliseconds with three digits, without an exponent."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def step_table(lines: Sequence[dict]) -> str:
    """One row for each architecture: the step beside the eager one, what it spends, how near to the floor it is."""
    rows = []
    for line in lines:
        found, settings, floor = {row.name: row for row in loop_rows(line)}, line["settings"], line["floor"]
        step, eager = found["step"], found.get("eager step")
        parts = shares(line["parts"])
        seconds = settings["batch_size"] / step.value.median
        rows.append(
            [settings["arch"], settings["image_size"], settings["batch_size"], spread(step.value)]
            + ([spread(eager.value), spread(step.times)] if eager else ["not measured"] * 2)
            + [f"{parts[name]:.0%}" for name in PARTS]
            + [f"{floor[name] / seconds:.0%}" for name in ("arithmetic_seconds", "memory_seconds")]
        )
    head = ["encoder", "pixels", "batch", "step, pairs/s", "eager, pairs/s", "times the eager step"]
    return as_table([*head, *PARTS, "arithmetic floor, of its time", "memory floor"], rows)


def loop_table(lines: Sequence[dict]) -> str:
    """One row for each loop: pairs of views a second, and the ratio to the peer; the slowest last."""
    rows = []
    for line in lines:
        setting = [line["settings"]["arch"]]
        for row in sorted(loop_rows(line), key=lambda row: -row.value.median):
            rows.append([*setting, row.name, spread(row.value), spread(row.times)])
        rows += [[*setting, name, "not measured", why] for name, why in line.get("not_measured", {}).items()]
    return as_table(["encoder", "loop", "pairs/s", f"times {lines[0]['beside']!r}"], rows)


def suite_table(lines: Sequence[dict]) -> str:
    """One row for each stage: how it ended and what it found."""
    rows = [[line["name"], f"{line['state']} after {line['seconds']:.0f} s", " ".join(line["found"])] for line in lines]
    return as_table(["stage", "ended", "verdict"], rows)


def rows_table(found: Sequence[Row]) -> str:
    """Any result: one row for each contestant of each setting."""
    return as_table(
        ["setting", "contestant", "median (tenth to ninetieth percentile)"],
        [[row.group, row.name, f"{spread(row.value)} {row.unit}"] for row in found],
    )


def loader_table(result: dict) -> str:
    """One row for each loader: CPU time, rate, share of the bare decoder's."""
    loaders = result["loaders"]
    bare = loaders["libjpeg-turbo alone"]["cpu_ms_per_pair"]["median"]
    rows = []
    for name, line in sorted(loaders.items(), key=lambda item: item[1]["cpu_ms_per_pair"]["median"]):
        cpu = line["cpu_ms_per_pair"]
        rows.append(
            [name, f"{cpu['median']:.3f} ({cpu['low']:.3f} to {cpu['high']:.3f})"]
            + [f"{line['pairs_per_second']['median']:,.0f}", f"{100 * bare / cpu['median']:,.0f} %"]
            + [f"{line['first_batch_seconds']:.2f}"]
        )
    return as_table(["loader", "CPU ms a pair", "pairs/s", "of the bare decoder's rate", "first batch, s"], rows)


LAYOUTS: dict[str, Callable[..., str]] = {
    "loss": loss_table,
    "step": step_table,
    "all": loop_table,
    "peers": loop_table,
    "suite": suite_table,
    "loader": loader_table,
}


def result_table(path: Path, stage: str) -> str:
    """The line that says where a result comes from, its table, its verdicts."""
    result = read_result(path)
    layout = LAYOUTS.get(stage)
    table = layout(result.get("lines", result)) if layout else rows_table(rows(stage, result))
    said = [f"- {verdict}" for verdict in verdicts(stage, result)]
    return "\n\n".join([where(result["environment"]), table, *["\n".join(said)] * bool(said)])


def write_report(path: Path, stage: str) -> list[Path]:
    """Beside a result NAME.json: NAME.md, and NAME.png where there is something to draw."""
    page, picture, result = path.with_suffix(".md"), path.with_suffix(".png"), read_result(path)
    found = rows(stage, result) if stage != "suite" else []
    picture_line = f"\n\n![{path.stem}]({picture.name})" if found else ""
    page.write_text(f"# {path.stem}\n\n{result_table(path, stage)}{picture_line}\n")
    if found:
        plot(found, where(result["environment"]).replace("`", ""), picture)
    return [page, *[picture] * bool(found)]


def index_table() -> str:
    """The results under benchmarks/: file, stage, machine, commit, date, command."""
    lines = []
    for path in sorted((ROOT / "benchmarks").glob("*.json")):
        e = read_result(path)["environment"]
        machine = ", ".join(e["gpus"]) or f"{e['threads']} thread(s) of {e.get('cpu', 'a CPU')}"
        command = f"`python {' '.join(e['command'])}`"
        lines.append([f"[{path.name}]({path.name})", machine, str(e["commit"])[:8], e["started"][:10], command])
    return as_table(["file", "measured on", "commit", "date", "command"], lines)
