"""The stages that the suites run, with their options and their shares of the time."""

from __future__ import annotations

from typing import NamedTuple

from fastssl.bench.step import ARCHS


class Entry(NamedTuple):
    """One run of a stage."""

    name: str
    stage: str
    argv: list[str]
    seconds: float  # its share of the time
    rest: float = 0.0  # seconds that it may still need for what it has begun when its share is over


class Sizes(NamedTuple):
    """How much the suite measures."""

    device: str
    image_size: int
    batch_size: int
    queue_size: int
    steps: int
    rounds: int
    photos: int  # in the generated data set
    archs: tuple[str, ...]
    compile_seconds: float

    @classmethod
    def gpu(cls) -> Sizes:
        return cls("cuda", 224, 256, 65536, 12, 5, 2048, ARCHS, 120.0)

    @classmethod
    def cpu(cls) -> Sizes:
        return cls("cpu", 64, 32, 65536, 3, 5, 256, ARCHS[:-1], 0.0)

    @classmethod
    def tiny(cls) -> Sizes:
        return cls("cpu", 32, 4, 16, 1, 1, 24, ("mobilenetv3_small",), 60.0)


def step_flags(sizes: Sizes) -> list[str]:
    """The flags that step, all and peers share."""
    names = ("device", "image_size", "batch_size", "queue_size", "steps", "rounds")
    return [text for name in names for text in (f"--{name.replace('_', '-')}", str(getattr(sizes, name)))]


def compile_ahead(sizes: Sizes) -> list[list[str]]:
    """For each architecture, a command that leaves its compiled encoders in the compiler's cache."""
    once = step_flags(sizes._replace(steps=1, rounds=1))
    return [["step", "--no-eager", "--arch", arch, *once] for arch in sizes.archs]


def shared_entries(sizes: Sizes, data: str, beton: str, seconds: dict[str, float]) -> list[Entry]:
    """The stages loss, augment and loader, which both suites have."""
    device, rounds = ["--device", sizes.device], ["--rounds", str(sizes.rounds)]
    small, large = str(sizes.batch_size), str(4 * sizes.batch_size)
    queue = ["--queue-size", str(sizes.queue_size)]
    loss = [*device, *rounds, *queue, "--num", small, large, "--terms", "all"]
    augment = [*device, *rounds, "--size", str(sizes.image_size), "--batch-size", small]
    loader = [data, "--beton", beton, *rounds, "--batch-size", small]
    return [
        Entry("loss", "loss", loss, seconds["loss"]),
        Entry("augment", "augment", augment, seconds["augment"]),
        Entry("loader", "loader", loader, seconds["loader"]),
    ]


def cpu_entries(sizes: Sizes, data: str, beton: str) -> list[Entry]:
    """The stages of the CPU suite; the shares sum to 450 seconds."""
    bank, queries = str(80 * sizes.photos), str(8 * sizes.photos)
    evaluation = ["--rounds", str(sizes.rounds), "--bank", bank, "--queries", queries, "--epochs", "1"]
    files, flags = ["--beton", beton], step_flags(sizes)
    loops = [
        Entry("peers", "peers", [data, *files, *flags], 90),
        Entry("all", "all", ["--data", data, *files, *flags, "--loader", "folder", "beton", "resident"], 90),
        Entry("step", "step", ["--arch", *sizes.archs, *flags], 125),
        Entry("eval", "eval", evaluation, 25),
    ]
    return [*loops, *shared_entries(sizes, data, beton, {"loss": 40, "augment": 25, "loader": 55})]


def gpu_entries(sizes: Sizes, data: str, beton: str) -> list[Entry]:
    """The stages of the GPU suite, after the compilation; the shares sum to 380 seconds.

    `all` also measures the step. It comes last, since it can leave out encoders for which there is no time.
    """
    flags, files = step_flags(sizes), ["--data", data, "--beton", beton]
    loaders = ["--loader", "resident", "beton", "--no-classical"]
    peers = Entry("peers", "peers", [data, "--beton", beton, *flags], 110)
    loss, augment, loader = shared_entries(sizes, data, beton, {"loss": 30, "augment": 20, "loader": 40})
    # one process for all encoders, since starting it takes longer than measuring
    loops = ["--arch", *sizes.archs, *files, *flags, *loaders, "--profile"]
    return [loss, augment, peers, loader, Entry("all", "all", loops, 180, rest=90)]
