"""The folder of a run and what lands in it, and the clock that pauses while nothing is trained.

    config.yaml  environment.json  metrics.jsonl  tensorboard/  curves.png  views.png  checkpoints/

Rank 0 writes; on other ranks every call is a no-op.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from fastssl import checkpoint
from fastssl.config import Config
from fastssl.curves import draw_curves
from fastssl.recipe import to_yaml

TIMING = ("images_per_second", "seconds")  # the fields of metrics.jsonl in which equal runs differ


class Clock:
    """Seconds of training: evaluating, saving and drawing do not count."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()
        self.paused_for = 0.0

    def seconds(self) -> float:
        return time.perf_counter() - self.begin - self.paused_for

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.paused_for += time.perf_counter() - start


class Run:
    """Writes metrics, curves and the progress bar of one run; owns its folder."""

    def __init__(self, folder: Path, config: Config, first: int, total: int, writes: bool) -> None:
        self.folder, self.writes, self.total = folder, writes, total
        self.clock = Clock()
        self.images_per_step = config.train.batch_size
        self.last_log = (first, 0.0)
        if not writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.yaml", to_yaml(config))
        write_text(folder / "environment.json", json.dumps(environment(), indent=1) + "\n")
        trim_metrics(folder / "metrics.jsonl", first)
        self.metrics = open(folder / "metrics.jsonl", "a", buffering=1)  # a line is written when it is whole
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first + 1)
        self.bar = tqdm(total=total, initial=first, unit="step", dynamic_ncols=True, disable=None, smoothing=0.1)

    def say(self, text: str) -> None:
        """One line to the person, above the progress bar."""
        if self.writes:
            tqdm.write(text, file=sys.stderr)

    def advance(self) -> None:
        """One more step is done."""
        if self.writes:
            self.bar.update()

    def log(self, step: int, values: dict[str, float], steps_per_epoch: int) -> None:
        """Records the values of a step, counted from 1, and the speed since the last record."""
        if not self.writes:
            return
        last_step, last_seconds = self.last_log
        seconds = self.clock.seconds()
        speed = (step - last_step) * self.images_per_step / max(seconds - last_seconds, 1e-9)
        self.last_log = (step, seconds)
        self.record(step, {"epoch": round(step / steps_per_epoch, 4), **values}, speed, seconds)
        shown = {k: f"{values[k]:.4g}" for k in ("loss", "contrast", "align", "uniform", "top1", "lr") if k in values}
        self.bar.set_postfix({"images/s": f"{speed:.0f}", **shown})
        if self.bar.disable:  # no terminal: plain lines
            words = " ".join(f"{k} {v}" for k, v in shown.items())
            left = (self.total - step) * self.images_per_step / speed
            self.say(f"step {step}/{self.total} {words} images/s {speed:.0f} left {left / 60:.1f} min")

    def record(self, step: int, values: dict[str, float], speed: float | None = None, seconds: float = 0.0) -> None:
        """One line of metrics.jsonl and its TensorBoard points; timing fields come last."""
        if not self.writes:
            return
        timing = {} if speed is None else {"images_per_second": round(speed, 2), "seconds": round(seconds, 3)}
        self.metrics.write(json.dumps({"step": step, **values, **timing}) + "\n")
        for key, value in {**values, **timing}.items():
            if isinstance(value, (int, float)):
                self.board.add_scalar(key, value, step)

    def draw(self) -> None:
        """Brings curves.png up to date."""
        if self.writes:
            draw_curves(self.folder / "metrics.jsonl", self.folder / "curves.png")

    def close(self) -> None:
        """Flushes and closes everything; the folder is complete afterwards."""
        if self.writes:
            self.bar.close()
            self.metrics.close()
            self.board.close()


def write_text(path: Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def trim_metrics(path: Path, first: int) -> None:
    """Drops the lines after step `first`: a resumed run writes them again. A torn last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= first:
                kept.append(line + "\n")
    write_text(path, "".join(kept))


def default_folder(arch: str) -> Path:
    """runs/<arch>-<date>-<time>."""
    return Path("runs") / f"{arch}-{time.strftime('%Y%m%d-%H%M%S')}"


def check_folder(folder: Path, resume: str) -> None:
    """Refuses to mix a new run into the folder of an old one. Raises ValueError."""
    saved = checkpoint.saved_steps(folder / "checkpoints")
    if resume == "no" and saved:
        raise ValueError(
            f"{folder} holds a run saved at step {next(iter(saved))}: add --resume auto to go on, or choose another --output"
        )


def environment() -> dict[str, object]:
    """What a number depends on besides the configuration: command, commit, versions, devices."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": sys.argv,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def commit() -> str | None:
    """The commit of the source that runs, with a + when files differ from it; None outside a git checkout."""
    source = Path(__file__).resolve().parent.parent
    if not (source / ".git").exists():
        return None
    git = ["git", "-C", str(source)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")
