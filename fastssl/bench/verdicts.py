"""What a result means: a sentence for each line, from its own numbers, that says what binds and what to change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median

from fastssl.bench.loop_verdicts import ADVICE, ON_GPU, all_verdicts, peers_verdicts, step_verdicts
from fastssl.bench.results import RAW, Row, seconds_rows, split_ours
from fastssl.plural import counted

NEAR = 60  # percent of the floor above which there is little left to gain


def verdicts(stage: str, result: dict[str, object]) -> list[str]:
    """The sentences for the lines of a result; none for a stage without verdicts."""
    return list(VERDICTS[stage](result)) if stage in VERDICTS else []


def loader_verdicts(result: dict[str, object]) -> Iterator[str]:
    """How close the fastest of our loaders that decode comes to decoding alone."""
    cpu = {name: line["cpu_ms_per_pair"]["median"] for name, line in result["loaders"].items()}
    ours = sorted((ms, name) for name, ms in cpu.items() if name.startswith("ours") and name != "ours, resident")
    if not ours or RAW not in cpu:
        yield f"no verdict, which needs one of our loaders and {RAW!r}"
        return
    best, name = ours[0]
    share, rate = cpu[RAW] / best, result["loaders"][name]["pairs_per_second"]["median"]
    threads = counted(result["options"]["threads"], "thread")
    rates = f"{rate:,.0f} pairs/s on {threads}, {1e3 / best:,.0f} per core"
    if share > 1.25:
        yield (
            f"not bound by decoding these JPEGs: {name!r} takes only {1 / share:.2f} times the CPU time of the bare "
            f"decoder ({rates}), since it reads smaller images or pixels; more cores or --loader resident give more"
        )
    elif share >= 0.8:
        yield (
            f"bound by JPEG decoding: {name!r} takes {1 / share:.2f} times the CPU time of the bare decoder ({rates}); "
            "only more cores, smaller images (fastssl prep beton) or --loader resident give more"
        )
    else:
        yield f"bound by the loader itself: {name!r} reaches {share:.0%} of the bare decoder's rate per core ({rates})"


def loss_verdicts(result: dict[str, object]) -> Iterator[str]:
    """How far ours is from the floor, and from the published formula."""
    lines = result["lines"]
    ours = list(lines[0]["seconds"])[-1]
    floor = median(line["percent_of_floor"][ours] for line in lines)
    faster = [line["seconds"]["eager float32"]["median"] / line["seconds"][ours]["median"] for line in lines]
    if floor >= NEAR:
        binds = "bound by the matrix products: only a smaller --queue-size makes it faster"
    else:
        binds = "bound by what surrounds the matrix products: try a larger batch"
        if result["kernel"][0] == "triton":
            binds += " or other block sizes (python -m fastssl.bench.sweep_loss)"
    yield (
        f"{ours!r} is {min(faster):.1f} to {max(faster):.1f} times as fast as the published formula in eager float32, "
        f"at {floor:.0f} % of the floor (median of {counted(len(lines), 'shape')}); {binds}"
    )


def augment_verdicts(result: dict[str, object]) -> Iterator[str]:
    """Ours beside the fastest other, and beside the floor of the bytes; without those that do a part of the policy."""
    for line in result["lines"]:
        whole = [row for row in seconds_rows({"lines": [line]}) if not row.name.endswith(", its part")]
        ours, others = split_ours(sorted(whole, key=lambda row: row.value.median))
        floor = line["bytes"] / result["copy"] * 1e3 / ours[0].value.median
        binds = "arithmetic" if floor < 0.5 else "memory traffic"
        change = (ON_GPU if ours[0].name == "ours, triton" else ADVICE)["augmentation"]
        yield (
            f"views of {line['size']} pixels: {ours[0].name!r} {beside(ours[0], others)}; bound by {binds} (the bytes "
            f"alone would take {floor:.0%} of its time): try {change}"
        )


def beside(row: Row, others: list[Row]) -> str:
    """ "is N times as fast as X", for rows of times, the fastest first."""
    if not others:
        return "ran without others"
    return f"is {others[0].value.median / row.value.median:.1f} times as fast as {others[0].name!r}"


def convert_verdicts(result: dict[str, object]) -> Iterator[str]:
    share = next(line["share_of_alone"] for line in result["lines"] if line["what"] == "short side 256")
    if share >= 0.9:
        binds = "bound by that work: try more cores"
    else:
        binds = "bound by what surrounds that work: try other --workers or a faster disk"
    yield f"short side 256 runs at {share:.0%} of the rate of decoding, resizing and encoding alone; {binds}"


def eval_verdicts(result: dict[str, object]) -> Iterator[str]:
    """The k-NN search beside the others, and what a sweep costs beside one setting."""
    for line in result["lines"]:
        found = list(seconds_rows({"lines": [line]}))
        if line["what"] == "knn":
            ours, others = split_ours(sorted(found, key=lambda row: row.value.median))
            yield f"k-NN: {ours[0].name!r} {beside(ours[0], others)}; try more cores, or fewer images"
        else:
            ratio = found[1].value.median / found[0].value.median
            mend = ": train them together" if ratio < int(found[1].name.split()[0]) else ""
            yield f"sweep: {found[1].name} take {ratio:.1f} times as long as {found[0].name}{mend}"


VERDICTS: dict[str, Callable[[dict], Iterator[str]]] = {
    "step": step_verdicts,
    "all": all_verdicts,
    "peers": peers_verdicts,
    "loader": loader_verdicts,
    "loss": loss_verdicts,
    "augment": augment_verdicts,
    "convert": convert_verdicts,
    "eval": eval_verdicts,
}
