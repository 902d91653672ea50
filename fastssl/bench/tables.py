"""The tables of the results, in Markdown, in a layout for each stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastssl.bench.loop_verdicts import ADVICE, shares
from fastssl.bench.results import RAW, Row, loop_rows, spread

PARTS = tuple(ADVICE)  # of a step


def as_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows])


def loss_table(result: dict) -> str:
    """One row for each shape; the last contestant is ours."""
    rows = []
    for line in result["lines"]:
        seconds, extra, floor = line["seconds"], line["extra_bytes"], line["percent_of_floor"]
        *others, ours = seconds
        median, low, high = (seconds[ours][key] for key in ("median", "low", "high"))
        times_eager = f"{seconds['eager float32']['median'] / median:.1f}"
        mib = f"{extra['eager float32'] / 2**20:.0f}", f"{extra[ours] / 2**20:.1f}"
        medians = [ms(seconds[name]["median"]) for name in others] + [f"{ms(median)} ({ms(low)} to {ms(high)})"]
        setting = [line["terms"], line["num"], line["queue_size"]]
        rows.append([*setting, *medians, times_eager, f"{floor[ours]:.0f}", *mib])
    names = [f"{name}, ms" for name in seconds]
    tail = ["times eager", "% of the floor", "eager, extra MiB", "ours, extra MiB"]
    return as_table(["terms", "N", "K", *names, *tail], rows)


def ms(seconds: float) -> str:
    """Milliseconds with three digits and no exponent."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def step_table(result: dict) -> str:
    """One row for each architecture: the rate of the step, that of the eager step, their parts and the floor."""
    rows = []
    for line in result["lines"]:
        found, settings, parts = {row.name: row for row in loop_rows(line)}, line["settings"], shares(line["parts"])
        step, eager = found["step"], found.get("eager step")
        seconds = settings["batch_size"] / step.value.median
        sizes = [settings[name] for name in ("arch", "image_size", "batch_size")]
        rates = [spread(eager.value), spread(step.times)] if eager else ["not measured"] * 2
        percents = [f"{parts[name]:.0%}" for name in PARTS]
        floors = [f"{line['floor'][name] / seconds:.0%}" for name in ("arithmetic_seconds", "memory_seconds")]
        rows.append([*sizes, spread(step.value), *rates, *percents, *floors])
    head = ["encoder", "pixels", "batch", "step, pairs/s", "eager step, pairs/s", "times the eager step"]
    return as_table([*head, *PARTS, "arithmetic floor / step", "memory floor / step"], rows)


def loop_table(result: dict) -> str:
    """One row for each loop, the fastest first: pairs of views per second, and how many times faster than the peer."""
    rows = []
    for line in result["lines"]:
        arch = line["settings"]["arch"]
        for row in sorted(loop_rows(line), key=lambda row: -row.value.median):
            rows.append([arch, row.name, spread(row.value), spread(row.times)])
        for name, reason in line.get("not_measured", {}).items():
            rows.append([arch, name, "not measured", reason])
    return as_table(["encoder", "loop", "pairs/s", f"times {result['lines'][0]['beside']!r}"], rows)


def suite_table(result: dict) -> str:
    """One row for each stage: how it ended, and its verdicts."""
    rows = []
    for line in result["lines"]:
        rows.append([line["name"], f"{line['state']} after {line['seconds']:.0f} s", " ".join(line["found"])])
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


LAYOUTS: dict[str, Callable[[dict], str]] = {
    "loss": loss_table,
    "step": step_table,
    "all": loop_table,
    "peers": loop_table,
    "suite": suite_table,
    "loader": loader_table,
}
