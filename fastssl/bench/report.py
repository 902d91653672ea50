"""`bench_throughput.py report`: writes the tables of the READMEs from the JSON files in benchmarks/.

Everything between `<!-- table: NAME.json -->` and `<!-- end of table -->` is replaced by the table of that result; the
table `index` lists all results. `--report DIR` of any stage writes such a page beside its JSON, with a plot.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from fastssl.bench.plot import plot
from fastssl.bench.results import read_result, rows, stage_of
from fastssl.bench.tables import LAYOUTS, as_table, rows_table
from fastssl.bench.verdicts import verdicts
from fastssl.data_prep.files import write_text
from fastssl.plural import counted

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "kernels/README.md", "benchmarks/README.md")
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
INDEX = "index"  # the name of the table of all results


def main(argv: Sequence[str]) -> None:
    """Rewrites the tables; with --check, only says which pages are out of date."""
    parser = argparse.ArgumentParser(prog="bench_throughput.py report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only check: exit with 1 if a page is out of date")
    args = parser.parse_args(argv)
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
    measured_on, commit, date, command = origin(environment)
    return f"{command} on {measured_on}, torch {environment['torch']}, commit {commit}, {date}:"


def origin(environment: dict) -> tuple[str, str, str, str]:
    """(machine, commit, date, command) of a result."""
    command = f"`{shlex.join(['python', *environment['command']])}`"
    return machine(environment), str(environment["commit"])[:8], environment["started"][:10], command


def machine(environment: dict) -> str:
    """The GPUs, and how many threads of which CPU: a result may need either, or both."""
    threads = counted(environment["threads"], "CPU thread")
    names = [environment[name] for name in ("cpu", "cpu_instructions") if name in environment]
    return ", ".join([*environment["gpus"], f"{threads} ({', '.join(names)})" if names else threads])


def result_table(path: Path, stage: str) -> str:
    """The line that says where a result comes from, its table and its verdicts."""
    result = read_result(path)
    table = LAYOUTS[stage](result) if stage in LAYOUTS else rows_table(rows(stage, result))
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
    paths = sorted((ROOT / "benchmarks").glob("*.json"))
    lines = [[f"[{path.name}]({path.name})", *origin(read_result(path)["environment"])] for path in paths]
    return as_table(["file", "measured on", "commit", "date", "command"], lines)
