"""What the results of step, all and peers mean: what binds a training loop, and what to change."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from fastssl.bench.results import loop_rows, split_ours, spread
from fastssl.bench.timing import in_words, times_faster

BOUND = 0.95  # share of the step's rate above which the loader does not matter
ALONE = 0.5  # share of the step's time below which its parts, each by itself, do not explain it
HOST_BOUND = 0.85  # share of the step's time above which the device waits for the host's launches

ADVICE = {  # part of the step -> what makes it faster
    "augmentation": "a GPU, where Triton makes the views, or smaller images (fastssl prep beton --short-side)",
    "encoders": "a larger --batch-size or a smaller --image-size",
    "loss": "a smaller --queue-size, or on a GPU --queue-dtype bf16",
    "optimiser + EMA + queue": "a larger --batch-size, since its cost does not grow with the batch",
}
ON_GPU = ADVICE | {"augmentation": "smaller images or views", "loss": "a smaller --queue-size"}  # where it is on one


def shares(parts: dict[str, float]) -> dict[str, float]:
    """Each part's share of their sum, largest first; the two encoders count as one part."""
    total, merged = sum(parts.values()), {}
    for name, seconds in parts.items():
        key = "encoders" if name.startswith("encoder_") else name
        merged[key] = merged.get(key, 0.0) + seconds / total
    return dict(sorted(merged.items(), key=lambda item: -item[1]))


def bound_of_step(line: dict[str, object], seconds: float) -> str:
    """What a step of so many seconds waits for: the host, nothing that runs by itself, or the longest of its parts."""
    host, compiled = line.get("host_seconds", 0.0), line["settings"]["compile"]
    if host >= HOST_BOUND * seconds:
        tried = "graphs" in (compiled, line.get("compiled")) or "CUDA graphs" in line.get("why_compiled", "")
        mend = f"try {'' if tried else '--compile graphs, '}a larger --batch-size or a faster core"
        return f"bound by the host, which takes {host / seconds:.0%} of the step to launch its kernels: {mend}"
    if (explained := sum(line["parts"].values()) / seconds) < ALONE:
        return f"bound by the time between its parts, which take {explained:.0%} of it by themselves: try --profile"
    (first, share), *rest = shares(line["parts"]).items()
    others = ", ".join(f"{name} {other:.0%}" for name, other in rest)
    compiling = "--compile on, " if first == "encoders" and compiled == "off" else ""  # auto: where it helps
    advice = (ON_GPU if line["settings"].get("device") == "cuda" else ADVICE)[first]
    return f"bound by the {first}, {share:.0%} of the step ({others}): try {compiling}{advice}"


def step_verdict(line: dict[str, object]) -> str:
    """What binds the step, and how near it is to its floor."""
    seconds = median(line["seconds_of_rounds"]["step"])
    verdict = bound_of_step(line, seconds)
    if floor := line.get("floor"):
        kind = "arithmetic" if floor["arithmetic_seconds"] >= floor["memory_seconds"] else "memory traffic"
        share = max(floor["arithmetic_seconds"], floor["memory_seconds"]) / seconds
        verdict += f"; the floor, set by {kind}, is {share:.0%} of its time"
        if share > 1 and kind == "arithmetic":
            verdict += " (convolutions by Winograd, or without padding, take less than the operations it counts)"
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
        if not others:
            yield f"none of the others ran{missing}"
            continue
        ratio = times_faster(line["seconds_of_rounds"], ours[0].name, others[0].name)
        change = "" if ratio.low > 1 else "; `bench_throughput.py all` says what binds our loop"
        yield (
            f"{line['settings']['arch']}: {ours[0].name!r} runs at {spread(ratio)} times the rate of the fastest "
            f"other, {others[0].name!r} ({in_words(ratio)}), and at {spread(ours[0].times)} times that of "
            f"{line['beside']!r}{change}{missing}"
        )
