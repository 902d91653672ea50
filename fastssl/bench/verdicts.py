"""What a result means: one sentence for each line, from its own numbers, that says what binds and what to change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median

from fastssl.bench.results import Row, loader_rows, loop_rows, seconds_rows, spread
from fastssl.bench.timing import in_words, times_faster

BOUND = 0.95  # of the step's rate: above it the loader does not matter
RAW = "libjpeg-turbo alone"
HOST_BOUND = 0.85  # of the step's time: the device then waits for launches
NEAR = 60  # percent of the floor from which little is left to gain

ADVICE = {  # part of the step -> what makes it smaller
    "augmentation": "a GPU, whose views are Triton's; images stored smaller (fastssl prep beton --short-side)",
    "encoders": "--compile on, a larger --batch-size or a smaller --image-size",
    "loss": "a smaller --queue-size, or on a GPU --queue-dtype bf16",
    "optimiser + EMA + queue": "a larger --batch-size: its cost does not grow with the batch",
}


def verdicts(stage: str, result: dict[str, object]) -> list[str]:
    """One sentence for each line of the result. A stage may also write its own, as `verdict` of a line."""
    own = [line["verdict"] for line in result.get("lines", []) if "verdict" in line]
    own += [result["verdict"]] if "verdict" in result else []
    return own or list(VERDICTS.get(stage, lambda result: iter(()))(result))


def shares(parts: dict[str, float]) -> dict[str, float]:
    """Each part's share of their sum, both encoders as one, largest first."""
    total, merged = sum(parts.values()), {}
    for name, seconds in parts.items():
        key = "encoders" if name.startswith("encoder_") else name
        merged[key] = merged.get(key, 0.0) + seconds / total
    return dict(sorted(merged.items(), key=lambda item: -item[1]))


def step_verdict(line: dict[str, object]) -> str:
    """Which part of the step to make smaller."""
    found = shares(line["parts"])
    first, *rest = found
    advice = ADVICE[first]
    s = line["settings"]
    if s["compile"] != "off":  # auto compiles where it helps
        advice = advice.removeprefix("--compile on, ")
    others = ", ".join(f"{name} {found[name]:.0%}" for name in rest)
    said = f"bound by the {first}, {found[first]:.0%} of the step ({others}): {advice}"
    seconds = median(line["seconds_of_rounds"]["step"])
    if (host := line.get("host_seconds", 0.0)) >= HOST_BOUND * seconds:
        graphs = "" if "graphs" in (s["compile"], line.get("compiled")) else "--compile graphs, "
        said = f"bound by the host, which takes {host / seconds:.0%} of the step to launch its kernels: "
        said += f"{graphs}a larger --batch-size or a faster core"
    if floor := line.get("floor"):
        kind = "arithmetic" if floor["arithmetic_seconds"] >= floor["memory_seconds"] else "memory traffic"
        share = max(floor["arithmetic_seconds"], floor["memory_seconds"]) / seconds
        said += f"; its floor, {kind}, is {share:.0%} of its time"
    return said


def step_verdicts(result: dict[str, object]) -> Iterator[str]:
    for line in result["lines"]:
        yield f"{line['settings']['arch']}: {step_verdict(line)}"


def all_verdict(share: float, spare: float) -> str:
    """What binds the whole loop: it runs at `share` of the step, and the loader alone at `spare` times the step."""
    runs = f"the loop runs at {share:.0%} of it"
    if share >= BOUND:
        return f"bound by the step: {runs}, the loader alone could feed {spare:.1f} of them"
    if spare < 1:
        mend = "convert the images (fastssl prep beton), use --loader resident, or more cores"
        return f"bound by the loader: alone it gives {spare:.0%} of what the step takes; {mend}"
    if spare > 1 / (1 - BOUND):
        noise = "look again with more --steps, or on a quieter machine"
        return f"bound by the step: {runs}, though the loader alone takes {1 / spare:.1%} of its time; {noise}"
    mend = "both want the same cores: --loader resident, or images stored smaller (fastssl prep beton)"
    return f"bound by the cores beside the step: {runs} though the loader alone could feed {spare:.1f}; {mend}"


def all_verdicts(result: dict[str, object]) -> Iterator[str]:
    for line in result["lines"]:
        rounds = line["seconds_of_rounds"]
        for name in [name for name in rounds if name.startswith("all, ")]:
            loops = (name, name.replace("all", "loader alone", 1))
            share, spare = (times_faster(rounds, loop, "step").median for loop in loops)
            yield f"{line['settings']['arch']}, {name}: {all_verdict(share, spare)}"
        if line.get("parts"):
            yield f"{line['settings']['arch']}, its step: {step_verdict(line)}"


def peers_verdicts(result: dict[str, object]) -> Iterator[str]:
    """Our fastest loop beside the fastest of the others."""
    for line in result["lines"]:
        rounds, missing = line["seconds_of_rounds"], line["not_measured"]
        found = sorted(loop_rows(line), key=lambda row: -row.value.median)
        ours = [row for row in found if row.name.startswith("ours")]
        others = [row for row in found if not row.name.startswith("ours")]
        left_out = f"; not measured: {', '.join(missing)}" if missing else ""
        if not ours:
            yield f"none of our loaders ran{left_out}"
            continue
        ratio = times_faster(rounds, ours[0].name, others[0].name)
        what = in_words(ratio)
        change = "" if ratio.low > 1 else "; `bench_throughput.py all` says what binds our loop"
        yield (
            f"{line['settings']['arch']}: {ours[0].name!r} is {what} the fastest other, {others[0].name!r}: "
            f"{spread(ratio)} times its rate, and {spread(ours[0].times)} times that of {line['beside']!r}"
            f"{change}{left_out}"
        )


def loader_verdicts(result: dict[str, object]) -> Iterator[str]:
    """How close the fastest of our loaders that decode is to decoding alone."""
    cpu = {name: line["cpu_ms_per_pair"]["median"] for name, line in result["loaders"].items()}
    ours = sorted((ms, name) for name, ms in cpu.items() if name.startswith("ours") and name != "ours, resident")
    if not ours or RAW not in cpu:
        yield "no verdict: it needs one of our loaders and the bare decoder"
        return
    best, name = ours[0]
    share, rate = cpu[RAW] / best, max(row.value.median for row in loader_rows(result) if row.name == name)
    cores = f"{rate:,.0f} pairs/s on {result['options']['threads']} threads, {1e3 / best:,.0f} for a full core"
    if share >= 0.8:
        yield (
            f"bound by JPEG decoding: {name!r} takes {1 / share:.2f} times the bare decoder's CPU time, {cores}; only "
            "more cores, smaller images (fastssl prep beton) or --loader resident give more"
        )
    else:
        yield f"bound by the loader itself: {name!r} gives {share:.0%} of the bare decoder's rate, {cores}"


def loss_verdicts(result: dict[str, object]) -> Iterator[str]:
    """How far ours is from the floor and from the others."""
    lines = result["lines"]
    ours = list(lines[0]["seconds"])[-1]
    floor = median(line["percent_of_floor"][ours] for line in lines)
    faster = [line["seconds"]["eager float32"]["median"] / line["seconds"][ours]["median"] for line in lines]
    tuning = " or block sizes for this device (python -m fastssl.bench.sweep_loss)" * (result["kernel"][0] == "triton")
    near, far = (
        "bound by the matrix products: only a smaller --queue-size makes it faster",
        f"bound by what surrounds the matrix products: a larger batch{tuning} brings it nearer to them",
    )
    yield (
        f"{ours!r} is {min(faster):.1f} to {max(faster):.1f} times as fast as the published formula in eager float32, "
        f"at {floor:.0f} % of the floor (median of {len(lines)} shapes); {near if floor >= NEAR else far}"
    )


def augment_verdicts(result: dict[str, object]) -> Iterator[str]:
    """Ours beside the fastest other, and the floor of the bytes."""
    for line in result["lines"]:
        found = sorted(seconds_rows({"lines": [line]}), key=lambda row: row.value.median)
        ours, others = ([row for row in found if row.name.startswith("ours") is mine] for mine in (True, False))
        floor = line["bytes"] / result["copy"] * 1e3 / ours[0].value.median
        binds = "arithmetic" if floor < 0.5 else "memory traffic"
        change = ADVICE["augmentation"] if ours[0].name != "ours, triton" else "smaller stored images or views"
        yield (
            f"views of {line['size']}: {ours[0].name!r} {beside(ours[0], others)}; bound by {binds} "
            f"({floor:.0%} of the floor of its bytes): {change}"
        )


def beside(row: Row, others: list[Row]) -> str:
    """'is N times as fast as X', for rows of times, fastest first."""
    return (
        f"is {others[0].value.median / row.value.median:.1f} times as fast as {others[0].name!r}" if others else "alone"
    )


def convert_verdicts(result: dict[str, object]) -> Iterator[str]:
    share = next(line["share_of_alone"] for line in result["lines"] if line["what"] == "short side 256")
    binds = (
        "decoding, resizing and encoding: more cores" if share >= 0.9 else "what surrounds them: --workers, the disk"
    )
    yield f"short side 256 runs at {share:.0%} of decoding, resizing and encoding alone; bound by {binds}"


def eval_verdicts(result: dict[str, object]) -> Iterator[str]:
    """The k-NN search beside the others, and what a sweep costs beside one setting."""
    for line in result["lines"]:
        ours, *others = sorted(seconds_rows({"lines": [line]}), key=lambda row: (row.name != "ours", row.value.median))
        if line["what"] == "knn":
            change = "fewer images (--knn-images while training) or more cores: its products are bank x queries"
            yield f"k-NN: {ours.name!r} {beside(ours, others)}; what is left to change: {change}"
        else:
            ratio = others[0].value.median / ours.value.median
            yield f"sweep: {others[0].name!r} take {ratio:.1f} times as long as {ours.name!r}: try them all at once"


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
