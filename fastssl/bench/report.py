"""`bench_throughput.py report`: writes the tables of the READMEs from the JSON under benchmarks/, so none can drift.

A table stands between `<!-- table: NAME.json -->` and `<!-- end of table -->`; what is between them is replaced.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "kernels/README.md", "benchmarks/README.md")
BLOCK = re.compile(r"(<!-- table: (\S+?)\.json -->\n).*?(<!-- end of table -->)", re.DOTALL)


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
    """The page with every table made anew. Raises ValueError for a table whose JSON or layout is not known."""

    def table(match: re.Match) -> str:
        path = ROOT / "benchmarks" / f"{match[2]}.json"
        if not path.exists():
            raise ValueError(f"a page shows a table of {path}, which does not exist")
        result = json.loads(path.read_text())
        layout = next((make for name, make in LAYOUTS.items() if match[2].startswith(name)), None)
        if layout is None:
            raise ValueError(f"no layout for {path.name}: its name must begin with {', '.join(LAYOUTS)}")
        return f"{match[1]}{where(result['environment'])}\n\n{layout(result.get('lines', result))}\n{match[3]}"

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


def loop_table(lines: Sequence[dict]) -> str:
    """One row for each architecture and contestant: images (pairs of views) a second, and the ratio to the peer."""
    rows = []
    for line in lines:
        settings, seconds = line["settings"], line["seconds_per_step"]
        batch = settings.get("batch_size", 256)
        beside = seconds.get("classical") or seconds["eager step"]
        for name, timing in seconds.items():
            rate = f"{batch / timing['median']:.0f} ({batch / timing['high']:.0f} to {batch / timing['low']:.0f})"
            rows.append([settings.get("arch", "resnet50"), name, rate, f"{beside['median'] / timing['median']:.2f}"])
    return as_table(["encoder", "loop", "pairs/s", "times the peer"], rows)


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
    "step": loop_table,
    "all": loop_table,
    "loader": loader_table,
}
