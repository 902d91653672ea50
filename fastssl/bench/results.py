"""Results as rows, whatever stage wrote them: what plots, comparisons and verdicts read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from fastssl.bench.timing import Timing, summarise, times_faster


class Row(NamedTuple):
    """One contestant in one setting."""

    group: str  # the setting: rows of a group may be compared
    name: str
    value: Timing  # in `unit`
    unit: str
    higher_is_better: bool
    times: Timing | None = None  # how many times faster than the group's peer, within the same rounds


def read_result(path: Path) -> dict[str, object]:
    """A result file. Raises ValueError for what is none."""
    try:
        result = json.loads(path.read_text())
        result["environment"]["commit"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a result of bench_throughput.py: {error!r}") from None
    return result


def stage_of(path: Path) -> str:
    """The stage by the file's name: step-cpu.json -> step."""
    return path.stem.split("-")[0]


def rows(stage: str, result: dict[str, object], name: str = "this") -> list[Row]:
    """Every contestant of every setting. Raises ValueError where `name`, the result, is not one of the stage."""
    try:
        return list(READERS.get(stage, seconds_rows)(result))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} is no result of {stage!r}: it lacks {error}") from None


def invert(seconds: Timing, work: float) -> Timing:
    """Work per second, from seconds for that work."""
    return Timing(work / seconds.median, work / seconds.high, work / seconds.low, seconds.rounds)


def loop_rows(line: dict[str, object]) -> Iterator[Row]:
    """The training loops of one line of step, all or peers: pairs/s."""
    s, rounds = line["settings"], line["seconds_of_rounds"]
    group = f"{s['arch']}, {s['image_size']} pixels, batch {s['batch_size']}"
    for name, seconds in rounds.items():
        rate = invert(summarise(seconds), s["batch_size"])
        yield Row(group, name, rate, "pairs/s", True, times_faster(rounds, name, line["beside"]))


def all_loop_rows(result: dict[str, object]) -> Iterator[Row]:
    for line in result["lines"]:
        yield from loop_rows(line)


def loader_rows(result: dict[str, object]) -> Iterator[Row]:
    for name, loader in result["loaders"].items():
        yield Row("loaders", name, Timing(**loader["pairs_per_second"]), "pairs/s", True)


def convert_rows(result: dict[str, object]) -> Iterator[Row]:
    for line in result["lines"]:
        timing = Timing(line["images_per_s"], line["low"], line["high"], result["rounds"])
        yield Row("conversion", line["what"], timing, "images/s", True)


def seconds_rows(result: dict[str, object]) -> Iterator[Row]:
    """Lines with `seconds`, a timing for each contestant; what else describes the line names the group."""
    for line in result["lines"]:
        tells = {k: v for k, v in line.items() if isinstance(v, (int, str)) and k not in ("bytes", "verdict", "kernel")}
        group = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in tells.items())
        for name, timing in line["seconds"].items():
            milli = {key: 1e3 * timing[key] for key in ("median", "low", "high")}
            yield Row(group, name, Timing(**milli, rounds=timing["rounds"]), "ms", False)


READERS: dict[str, Callable[[dict], Iterator[Row]]] = {
    "step": all_loop_rows,
    "all": all_loop_rows,
    "peers": all_loop_rows,
    "loader": loader_rows,
    "convert": convert_rows,
}


def number(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(timing: Timing) -> str:
    """Median, and in brackets the tenth and ninetieth percentile."""
    return f"{number(timing.median)} ({number(timing.low)} to {number(timing.high)})"


def show_row(row: Row) -> str:
    """One line for the terminal."""
    times = f"{row.times.median:6.2f} x ({row.times.low:.2f} to {row.times.high:.2f})" if row.times else ""
    return f"{row.name:28} {spread(row.value) + ' ' + row.unit:34} {times}".rstrip()
