"""`--compare OLD.json`: compares a result with an earlier one, row by row, in view of the spread of both.

What differs between the two measurements is said before the second one begins, as far as it is known then.
"""

from __future__ import annotations

from pathlib import Path

from fastssl.bench.results import Row, group_of
from fastssl.bench.timing import FEWEST_ROUNDS
from fastssl.environment import environment

MACHINE = ("device", "gpus", "cpu", "cpu_instructions", "cpus", "threads")
_old: dict[str, object] | None = None  # the result to compare with


def compare_with(old: dict[str, object] | None) -> None:
    """The result with which that of this process will be compared, if any."""
    global _old
    _old = old


def announce(planned: dict[str, object]) -> None:
    """Prints what will be measured otherwise than in the result to compare with, before it is.

    planned: the result of a stage without machine and figures. Raises ValueError if no row will be comparable.
    """
    if _old is None:
        return
    theirs, ours = ({group_of(line) for line in result.get("lines", [])} for result in (_old, planned))
    if ours and not theirs & ours:
        raise _nothing_in_common(theirs, ours)
    print("".join(f"{found}\n" for found in differences(_old, planned | {"environment": environment()})), end="")


def _nothing_in_common(theirs: set[str], ours: set[str]) -> ValueError:
    theirs, ours = ("; ".join(sorted(groups)) for groups in (theirs, ours))
    return ValueError(f"no row to compare: the old result has {theirs}; the new one has {ours}: use the same options")


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
        raise _nothing_in_common(*({group for group, _ in found} for found in (before, after)))
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


def differences(old: dict, new: dict) -> list[str]:
    """Warnings, if machine or options of the two results differ."""
    found = (differing_machines(old["environment"], new["environment"]), differing_options(old, new))
    return [warning for warning in found if warning]


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
            found[""] |= {"images": line["images"]} if "images" in line else {}
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
