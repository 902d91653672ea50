"""What a result means: a sentence for each line, from its own numbers, that says what binds and what to change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median

from fastssl.bench.results import Row, count, loader_rows, loop_rows, seconds_rows, split_ours, spread
from fastssl.bench.timing import in_words, times_faster

BOUND = 0.95  # share of the step's rate above which the loader does not matter
RAW = "libjpeg-turbo alone"
HOST_BOUND = 0.85  # share of the step's time above which the device waits for the host's launches
NEAR = 60  # percent of the floor above which there is little left to gain

ADVICE = {  # part of the step -> what makes it faster
    "augmentation": "a GPU, where Triton makes the views, or smaller images (fastssl prep beton --short-side)",
    "encoders": "a larger --batch-size or a smaller --image-size",
    "loss": "a smaller --queue-size, or on a GPU --queue-dtype bf16",
    "optimiser + EMA + queue": "a larger --batch-size, since its cost does not grow with the batch",
}


def verdicts(stage: str, result: dict[str, object]) -> list[str]:
    """The sentences for the lines of a result; none for a stage without verdicts."""
    return list(VERDICTS[stage](result)) if stage in VERDICTS else []


def shares(parts: dict[str, float]) -> dict[str, float]:
    """Each part's share of their sum, largest first; the two encoders count as one part."""
    total, merged = sum(parts.values()), {}
    for name, seconds in parts.items():
        key = "encoders" if name.startswith("encoder_") else name
        merged[key] = merged.get(key, 0.0) + seconds / total
    return dict(sorted(merged.items(), key=lambda item: -item[1]))


def step_verdict(line: dict[str, object]) -> str:
    """Which part of the step takes longest, or that it waits for the host."""
    seconds = median(line["seconds_of_rounds"]["step"])
    host, compiled = line.get("host_seconds", 0.0), line["settings"]["compile"]
    if host >= HOST_BOUND * seconds:
        graphs = "" if "graphs" in (compiled, line.get("compiled")) else "--compile graphs, "
        verdict = f"bound by the host, which takes {host / seconds:.0%} of the step to launch its kernels: "
        verdict += f"try {graphs}a larger --batch-size or a faster core"
    else:
        part_shares = shares(line["parts"])
        first, *rest = part_shares
        others = ", ".join(f"{name} {part_shares[name]:.0%}" for name in rest)
        compiling = (
            "--compile on, " if first == "encoders" and compiled == "off" else ""
        )  # auto compiles where it helps
        verdict = f"bound by the {first}, {part_shares[first]:.0%} of the step ({others}): "
        verdict += f"try {compiling}{ADVICE[first]}"
    if floor := line.get("floor"):
        kind = "arithmetic" if floor["arithmetic_seconds"] >= floor["memory_seconds"] else "memory traffic"
        share = max(floor["arithmetic_seconds"], floor["memory_seconds"]) / seconds
        verdict += f"; the floor, set by {kind}, is {share:.0%} of its time"
    return verdict


def step_verdicts(result: dict[str, object]) -> Iterator[str]:
    for line in result["lines"]:
        yield f"{line['settings']['arch']}: {step_verdict(line)}"


def all_verdict(share: float, spare: float) -> str:
    """What binds the loop, which runs at `share` of the step's rate, its loader alone at `spare` times that rate."""
    runs = f"the loop runs at {share:.0%} of the step's rate"
    if share >= BOUND:
        return f"bound by the step: {runs}, and the loader alone could feed {spare:.1f} such steps"
    if spare < 1:
        mend = "convert the images (fastssl prep beton), or try --loader resident or more cores"
        return f"bound by the loader, which even alone reaches only {spare:.0%} of the step's rate: {mend}"
    if spare > 1 / (1 - BOUND):
        mend = "measure again with more --steps, or on a quieter machine"
        return f"bound by the step: {runs}, although the loader alone needs only {1 / spare:.1%} of its time; {mend}"
    mend = "try --loader resident, or smaller images (fastssl prep beton)"
    feeds = f"although the loader alone could feed {spare:.1f} such steps"
    return f"bound by the cores, which loader and step share: {runs}, {feeds}; {mend}"


def all_verdicts(result: dict[str, object]) -> Iterator[str]:
    for line in result["lines"]:
        rounds, arch = line["seconds_of_rounds"], line["settings"]["arch"]
        for name in rounds:
            if name.startswith("all, "):
                share = times_faster(rounds, name, "step").median
                spare = times_faster(rounds, name.replace("all", "loader alone", 1), "step").median
                yield f"{arch}, {name}: {all_verdict(share, spare)}"
        if line.get("parts"):
            yield f"{arch}, its step: {step_verdict(line)}"


def peers_verdicts(result: dict[str, object]) -> Iterator[str]:
    """Our fastest loop beside the fastest of the others."""
    for line in result["lines"]:
        missing = f"; not measured: {', '.join(line['not_measured'])}" if line["not_measured"] else ""
        ours, others = split_ours(sorted(loop_rows(line), key=lambda row: -row.value.median))
        if not ours:
            yield f"none of our loaders ran{missing}"
            continue
        ratio = times_faster(line["seconds_of_rounds"], ours[0].name, others[0].name)
        change = "" if ratio.low > 1 else "; `bench_throughput.py all` says what binds our loop"
        yield (
            f"{line['settings']['arch']}: {ours[0].name!r} runs at {spread(ratio)} times the rate of the fastest "
            f"other, {others[0].name!r} ({in_words(ratio)}), and at {spread(ours[0].times)} times that of "
            f"{line['beside']!r}{change}{missing}"
        )


def loader_verdicts(result: dict[str, object]) -> Iterator[str]:
    """How close the fastest of our loaders that decode comes to decoding alone."""
    cpu = {name: line["cpu_ms_per_pair"]["median"] for name, line in result["loaders"].items()}
    ours = sorted((ms, name) for name, ms in cpu.items() if name.startswith("ours") and name != "ours, resident")
    if not ours or RAW not in cpu:
        yield f"no verdict, which needs one of our loaders and {RAW!r}"
        return
    best, name = ours[0]
    share, rate = cpu[RAW] / best, max(row.value.median for row in loader_rows(result) if row.name == name)
    threads = count(result["options"]["threads"], "thread")
    rates = f"{rate:,.0f} pairs/s on {threads}, {1e3 / best:,.0f} per core"
    if share >= 0.8:
        yield (
            f"bound by JPEG decoding: {name!r} takes {1 / share:.2f} times the CPU time of the bare decoder ({rates}); "
            "only more cores, smaller images (fastssl prep beton) or --loader resident give more"
        )
    else:
        yield f"bound by the loader itself: {name!r} reaches {share:.0%} of the bare decoder's rate ({rates})"


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
        f"at {floor:.0f} % of the floor (median of {count(len(lines), 'shape')}); {binds}"
    )


def augment_verdicts(result: dict[str, object]) -> Iterator[str]:
    """Ours beside the fastest other, and beside the floor of the bytes."""
    for line in result["lines"]:
        ours, others = split_ours(sorted(seconds_rows({"lines": [line]}), key=lambda row: row.value.median))
        floor = line["bytes"] / result["copy"] * 1e3 / ours[0].value.median
        binds = "arithmetic" if floor < 0.5 else "memory traffic"
        change = ADVICE["augmentation"] if ours[0].name != "ours, triton" else "smaller images or views"
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
        found = sorted(seconds_rows({"lines": [line]}), key=lambda row: row.value.median)
        if line["what"] == "knn":
            ours, others = split_ours(found)
            yield f"k-NN: {ours[0].name!r} {beside(ours[0], others)}; try more cores, or fewer images"
        else:
            ratio = found[1].value.median / found[0].value.median
            yield f"sweep: {found[1].name} take {ratio:.1f} times as long as {found[0].name}: train them together"


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
