"""`--compare OLD.json`: a result beside an earlier one, row by row, with the spread of both."""

from __future__ import annotations

from fastssl.bench.results import Row
from fastssl.bench.timing import FEWEST_ROUNDS

MACHINE = ("gpus", "cpu", "cpus", "threads")


def judge(old: Row, new: Row) -> tuple[float, str]:
    """(how many times as fast as before, "faster", "slower" or "within the noise"; of too few rounds none of them).

    Beyond the noise only when the two spreads, tenth to ninetieth percentile, do not touch.
    """
    ratio = new.value.median / old.value.median if new.higher_is_better else old.value.median / new.value.median
    if (rounds := min(old.value.rounds, new.value.rounds)) < FEWEST_ROUNDS:
        return ratio, f"of {rounds} round(s): no spread to judge by"
    apart = new.value.low > old.value.high or new.value.high < old.value.low
    return ratio, ("faster" if ratio > 1 else "slower") if apart else "within the noise"


def compare(old: list[Row], new: list[Row]) -> tuple[list[str], bool]:
    """(a line for each row that both have and a note for the others, whether any is slower)."""
    before, after = ({(row.group, row.name): row for row in found} for found in (old, new))
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
    """A warning where the two results are from different hardware or thread counts."""
    changed = [f"{name} {old.get(name)} -> {new.get(name)}" for name in MACHINE if old.get(name) != new.get(name)]
    return f"not the same machine, so no regression can be told: {', '.join(changed)}" if changed else None
