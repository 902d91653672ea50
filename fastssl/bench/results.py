"""Reads the results of all stages into the same kind of rows, for plots, comparisons and verdicts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from fastssl.bench.timing import Timing, summarise, times_faster
from fastssl.data_prep.files import write_text
from fastssl.environment import commit, environment, now

RAW = "libjpeg-turbo alone"  # the contestant of the stage loader that sets the pace


class Row(NamedTuple):
    """One contestant in one setting."""

    group: str  # the setting; only rows of the same group can be compared
    name: str
    value: Timing  # in `unit`
    unit: str
    higher_is_better: bool
    times: Timing | None = None  # how many times faster than the group's peer, by the ratios within rounds


def read_result(path: Path) -> dict[str, object]:
    """The content of a result file. Raises ValueError if it is not one."""
    try:
        result = json.loads(path.read_text())
        result["environment"]["commit"]
    except OSError as error:
        raise ValueError(f"{path} is not a result of bench_throughput.py: {error.strerror}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a result of bench_throughput.py: {error!r}") from None
    return result


@cache
def begun() -> dict[str, str | None]:
    """Commit and time of the first call, which is made before anything is measured."""
    return {"commit": commit(), "started": now()}


def write_result(path: Path, result: dict[str, object], **about_machine: object) -> None:
    """Writes a result file whole or not at all, with the machine: of the commit and the time at which it was begun."""
    result = {"environment": environment() | about_machine | begun(), **result}
    write_text(path, json.dumps(result, indent=1) + "\n")


def stage_of(path: Path) -> str:
    """The stage that a file is named after: step-cpu.json -> step."""
    return path.stem.split("-")[0]


def rows(stage: str, result: dict[str, object], name: str = "this") -> list[Row]:
    """Every contestant in every setting. Raises ValueError if the result, called `name`, is not one of the stage."""
    try:
        if (mark := MARKS.get(stage)) and not all(mark in line for line in result["lines"]):
            raise KeyError(mark)
        return list(READERS.get(stage, seconds_rows)(result))
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, ArithmeticError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{name} is not a result of the stage {stage!r}: {why}") from None


def invert(seconds: Timing, work: float) -> Timing:
    """Work per second, from the seconds that the work takes."""
    return Timing(work / seconds.median, work / seconds.high, work / seconds.low, seconds.rounds)


def group_of(line: dict[str, object]) -> str:
    """What a line is of: the main settings of loops, or its numbers and words."""
    if s := line.get("settings"):
        return f"{s['arch']}, {s['image_size']} pixels, batch {s['batch_size']}"
    setting = {k: v for k, v in line.items() if isinstance(v, (int, str)) and k != "bytes"}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in setting.items())


def loop_rows(line: dict[str, object]) -> Iterator[Row]:
    """The training loops in a line of step, all or peers, in pairs/s."""
    settings, rounds = line["settings"], line["seconds_of_rounds"]
    for name, seconds in rounds.items():
        rate = invert(summarise(seconds), settings["batch_size"])
        yield Row(group_of(line), name, rate, "pairs/s", True, times_faster(rounds, name, line["beside"]))


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
    """Lines with a timing for each contestant in `seconds`; their other numbers and words name the group."""
    for line in result["lines"]:
        for name, timing in line["seconds"].items():
            ms = {key: 1e3 * timing[key] for key in ("median", "low", "high")}
            yield Row(group_of(line), name, Timing(**ms, rounds=timing["rounds"]), "ms", False)


READERS: dict[str, Callable[[dict], Iterator[Row]]] = {
    "step": all_loop_rows,
    "all": all_loop_rows,
    "peers": all_loop_rows,
    "loader": loader_rows,
    "convert": convert_rows,
}
# stage: what its lines have and those of stages do not whose rows look alike, but cannot be compared with its own
MARKS = {"eval": "what", "loss": "terms", "augment": "size", "step": "parts", "peers": "not_measured"}


def split_ours(found: list[Row]) -> tuple[list[Row], list[Row]]:
    """(our rows, those of others), each in the order given."""
    ours = [row for row in found if row.name.startswith("ours")]
    return ours, [row for row in found if not row.name.startswith("ours")]


def number(value: float) -> str:
    """A number with three digits, or more if it is above 1000."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(timing: Timing) -> str:
    """The median, and in brackets the tenth and ninetieth percentiles."""
    return f"{number(timing.median)} ({number(timing.low)} to {number(timing.high)})"


def show_row(row: Row) -> str:
    """A row as a line for the terminal."""
    times = f"{row.times.median:6.2f} x ({row.times.low:.2f} to {row.times.high:.2f})" if row.times else ""
    value = f"{spread(row.value)} {row.unit}"
    return f"{row.name:28} {value:34} {times}".rstrip()
