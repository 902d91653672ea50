"""`--compare OLD.json`: compares a result with an earlier one, row by row, in view of the spread of both."""

from __future__ import annotations

from pathlib import Path

from fastssl.bench.results import Row
from fastssl.bench.timing import FEWEST_ROUNDS

MACHINE = ("device", "gpus", "cpu", "cpu_instructions", "cpus", "threads")


def judge(old: Row, new: Row) -> tuple[float, str]:
    """(how many times as fast as before, "faster", "slower" or "within the noise").

    It is within the noise if the spreads, tenth to ninetieth percentile, touch. With too few rounds for a spread, the
    text says that instead.
    """
    ratio = new.value.median / old.value.median if new.higher_is_better else old.value.median / new.value.median
    rounds = min(old.value.rounds, new.value.rounds)
    if rounds < FEWEST_ROUNDS:
        return ratio, f"with too few rounds to judge ({rounds})"
    if new.value.low <= old.value.high and new.value.high >= old.value.low:
        return ratio, "within the noise"
    return ratio, "faster" if ratio > 1 else "slower"


def compare(old: list[Row], new: list[Row]) -> tuple[list[str], bool]:
    """(a line for each row that both have, and notes that name the other rows; whether any is slower).

    Raises ValueError if they have no row in common.
    """
    before = {(row.group, row.name): row for row in old}
    after = {(row.group, row.name): row for row in new}
    if not before.keys() & after.keys():
        theirs, ours = ("; ".join(sorted({group for group, _ in found})) for found in (before, after))
        raise ValueError(
            f"no row to compare: the old result has {theirs}; the new one has {ours}: use the same options"
        )
    lines, slower = [], False
    for key in after:
        if key in before:
            ratio, word = judge(before[key], after[key])
            slower |= word == "slower"
            lines.append(f"{key[0]}: {key[1]}: {ratio:.2f} times as fast, {word}")
    for found, other, which in ((before, after, "the old"), (after, before, "the new")):
        if alone := [f"{group}: {name}" for group, name in found if (group, name) not in other]:
            lines.append(f"only in {which} result: {'; '.join(alone)}")
    return lines, slower


def differing_machines(old: dict, new: dict) -> str | None:
    """A warning, if the two results are from different hardware or thread counts."""
    known = [name for name in MACHINE if name in old and name in new]
    changed = [f"{name} {old[name]} -> {new[name]}" for name in known if old[name] != new[name]]
    return f"measured on another machine, so slower need not be a regression: {', '.join(changed)}" if changed else None


def options(result: dict) -> dict[str, dict[str, object]]:
    """What was measured: {encoder: its settings}, and for "" the options of all lines; of paths the names alone."""
    plain = {k: v for k, v in result.items() if isinstance(v, (str, int, type(None))) and k not in ("rounds", "ended")}
    found = {"": plain | result.get("options", {})}
    for line in result.get("lines", []):
        if "settings" in line:
            found[line["settings"]["arch"]] = line["settings"]
            found[""]["images"] = line.get("images", "")
    return {
        arch: {name: Path(value).name if isinstance(value, str) else value for name, value in settings.items()}
        for arch, settings in found.items()
    }


def differing_options(old: dict, new: dict) -> str | None:
    """A warning, if the two results were measured with different options, such as sizes, images or threads."""
    before, after, changed = options(old), options(new), []
    for arch in [arch for arch in before if arch in after]:
        names = before[arch] | after[arch] if arch else before[arch].keys() & after[arch].keys()
        for name in sorted(names):  # a setting that is not listed has its default
            theirs, ours = (found[arch].get(name, "default") for found in (before, after))
            if theirs != ours:
                changed.append(f"{arch} {name} {theirs} -> {ours}".strip())
    return f"measured with other options, so slower need not be a regression: {', '.join(changed)}" if changed else None
