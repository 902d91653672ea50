"""The folder of a run, its log, and a clock that counts only the time spent training.

    config.yaml  environment.json  metrics.jsonl  tensorboard/  curves.png  views.png  checkpoints/  lock

Rank 0 writes; on other ranks every call is a no-op.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from fastssl import checkpoint
from fastssl.augment.policy import Policy
from fastssl.augment.preview import save_preview
from fastssl.config import Config
from fastssl.curves import draw_curves
from fastssl.data_prep.files import write_text
from fastssl.distributed import Ranks, broadcast_object, gather_objects
from fastssl.environment import environment
from fastssl.health import REMEDY
from fastssl.loaders.make import Loader
from fastssl.plan import Plan
from fastssl.recipe import to_yaml
from fastssl.run_folder import lock_file, says_where, trim_metrics

SHOWN = ("loss", "contrast", "align", "uniform", "top1", "lr")  # beside the progress bar


class Clock:
    """Seconds spent training: evaluating, saving and drawing do not count."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.begin = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self.begin

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # steps still running count as training
        start = time.perf_counter()
        yield
        self.begin += time.perf_counter() - start


class Run:
    """The record of one run: its folder, its progress bar, its clock."""

    def __init__(self, folder: Path, config: Config, plan: Plan, first: int, ranks: Ranks) -> None:
        self.folder, self.config, self.plan, self.ranks = folder, config, plan, ranks
        self.clock = Clock(ranks.device)
        self.num_seen, self.unreadable = 0, list[str]()  # images of this rank's list; of all ranks
        self.writes, self.probed = ranks.rank == 0, False
        if not self.writes:
            return
        with says_where(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = lock_file(folder / "lock")
            kept = first
            if not checkpoint.saved_steps(folder / "checkpoints"):  # what lies here is of a run that never saved
                kept = 0
                (folder / "views.png").unlink(missing_ok=True)
            if first < plan.stop or not (folder / "config.yaml").exists():  # not of a run to which nothing is added
                write_text(folder / "config.yaml", to_yaml(config))
                write_text(folder / "environment.json", json.dumps(environment(), indent=1) + "\n")
            names, seconds = trim_metrics(folder / "metrics.jsonl", kept)
            self.metrics = open(folder / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115 (open as long as the run)
        self.probed, self.logged = "knn" in names, (first, seconds)  # step and seconds of the last record
        self.clock.begin -= seconds  # a run that goes on counts on
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=kept + 1)
        self.bar = tqdm(total=plan.stop, initial=first, unit="step", dynamic_ncols=True, disable=None, smoothing=0.1)

    def say(self, *lines: str) -> None:
        """Prints lines above the progress bar."""
        if self.writes:
            for line in lines:
                tqdm.write(line, file=sys.stderr)

    def say_bad_images(self, bad_images: Sequence[str]) -> None:
        """Prints and counts the entries of this growing list that are new on any rank. Call on all ranks."""
        new_by_rank = gather_objects(list(bad_images[self.num_seen :]), self.ranks)
        self.num_seen = len(bad_images)
        for line in itertools.chain(*new_by_rank):
            if line not in self.unreadable:
                self.unreadable.append(line)
                self.say(f"unreadable image {len(self.unreadable)}: {line}")

    def preview(self, loader: Loader, policy: Policy) -> None:
        """Draws views.png: eight images spread over the data set, each with its two views of epoch 0."""
        path = self.folder / "views.png"
        if not self.writes or path.exists():
            return
        with self.clock.paused():
            batch = next(loader.eval_batches(8, limit=8), None)
            if batch is not None:  # all eight may be unreadable
                save_preview(batch, policy, self.config.augment.image_size, self.config.train.seed, 0, path)

    def advance(self) -> None:
        """Moves the progress bar by one step."""
        if self.writes:
            self.bar.update()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Records and shows the values after `step` steps, and the speed since the last record."""
        if not self.writes:
            return
        (last_step, last_seconds), seconds = self.logged, self.clock.seconds()
        self.logged = (step, seconds)
        images = (step - last_step) * self.config.train.batch_size
        speed = images / max(seconds - last_seconds, 1e-9)
        self.record(step, {**values, "images_per_second": round(speed, 2), "seconds": round(seconds, 3)})
        shown = {key: f"{values[key]:.4g}" for key in SHOWN if key in values}
        self.bar.set_postfix({"images/s": f"{speed:.0f}", **shown})
        if self.bar.disable:  # not a terminal: plain lines
            words = "  ".join(f"{key} {value}" for key, value in shown.items())
            minutes = (self.plan.stop - step) * self.config.train.batch_size / speed / 60
            self.say(f"step {step}/{self.plan.stop}  {words}  images/s {speed:.0f}  remaining {minutes:.1f} min")

    def record(self, step: int, values: dict[str, float]) -> None:
        """Writes one line of metrics.jsonl, and the same values to TensorBoard."""
        if not self.writes:
            return
        line = {"step": step, "epoch": round(step / self.plan.steps_per_epoch, 4), **values}
        with says_where(self.folder):
            self.metrics.write(json.dumps(line) + "\n")
            for key, value in line.items():
                if key != "step":
                    self.board.add_scalar(key, value, step)

    def owes_probe(self, first: int) -> bool:
        """Whether the run was stopped between the checkpoint after `first` steps and its probe. Call on all ranks."""
        due = self.config.train.resume == "auto" and first > 0 and self.plan.probes_after(first)
        return due and not broadcast_object(self.probed, self.ranks)

    def probe(self, step: int, probe: Callable[[nn.Module], float], backbone: nn.Module) -> None:
        """Asks the k-NN probe after `step` steps, and records and shows its answer."""
        with self.clock.paused():
            percent = probe(backbone)
            if math.isnan(percent):
                self.say(f"step {step}/{self.plan.stop}  no knn: features are not finite in evaluation; {REMEDY}")
                return
            self.record(step, {"knn": percent})
            self.draw()
        self.say(f"step {step}/{self.plan.stop}  knn {percent:.2f} %")

    def draw(self) -> None:
        """Draws the curves."""
        if self.writes:
            draw_curves(self.folder / "metrics.jsonl", self.folder / "curves.png")

    def save(self, step: int, state: dict) -> None:
        """Saves a checkpoint after `step` steps, deletes old ones and draws the curves."""
        if not self.writes:
            return
        folder, t = self.folder / "checkpoints", self.config.train
        checkpoint.save(state, folder / checkpoint.name(step))
        checkpoint.prune(folder, step, t.keep_last, t.keep_every_epochs * self.plan.steps_per_epoch)
        self.draw()

    def close(self) -> None:
        """Flushes and closes everything."""
        if self.writes:
            with says_where(self.folder), self.lock, self.board, self.metrics:
                self.bar.close()
