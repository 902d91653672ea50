"""`fastssl demo`: the whole chain in minutes. Draws images, pretrains an encoder on them, measures what it learnt.

It needs no data, no network and no GPU; `--data DIR` uses an image folder instead of drawn images.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import tyro
from torch import nn

from fastssl import checkpoint, distributed
from fastssl.build import make_trainee, open_loader
from fastssl.command import run_command
from fastssl.config import Config, replace
from fastssl.data_prep.files import write_text
from fastssl.data_prep.find import find_images
from fastssl.demo_images import write_demo_images
from fastssl.eval.online import make_probe
from fastssl.plural import counted
from fastssl.recipe import load_recipe
from fastssl.train import pretrain

IMAGES = 3000, 500  # images to draw, for training and held out
IMAGES_SEEN = 30_000  # two CPU cores train on these in three minutes
# Settings for small pictures and few steps; everything else is the default.
SETTINGS = {
    "arch": "resnet18",
    "head": "simple",
    "image_size": 32,
    "eval_resize": 32,
    "crop_scale": (0.4, 1.0),
    "grey_scale": 0.4,
    "queue_size": 2048,
    "ema_momentum": 0.93,  # with a slower one the keys lag behind q, which wastes the first epochs
    "bn_splits": 4,
    "align_weight": 1.0,
    "uniform_t": 2.0,
    "lr": 0.06,
    "lr_schedule": "cosine",
    "knn_images": 2000,
    "precision": "fp32",  # so that the result does not depend on the machine
    "channels_last": "on",
    "compile": "off",  # compiling takes longer than this run on a GPU
    "keep_last": 1,
}
BATCH = 64


@dataclass(frozen=True)
class DemoOptions:
    """Draw images, pretrain a ResNet-18 on them, and compare its k-NN accuracy with raw pixels and an untrained one."""

    data: str | None = None
    """Use this folder of images instead: train/<class>/* and val/<class>/*, or <class>/*, or a flat folder."""
    output: str | None = None
    """Folder of all it writes, by default a new one below runs; name that of an interrupted demo to go on with it."""
    seed: int = 0
    """Seed of the images, the initial weights, the order and the augmentation."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""


def main(argv: Sequence[str]) -> int:
    """`fastssl demo`."""
    return demo(tyro.cli(DemoOptions, prog="fastssl demo", args=list(argv)))


def demo(options: DemoOptions) -> int:
    """The whole demo. Returns the exit code."""
    folder = Path(options.output) if options.output else free_folder(Path("runs"))
    check_folder(folder, options.seed)
    data = options.data or draw_images(folder / f"images-{options.seed}", options.seed)
    config = make_demo_config(options, folder, data)
    before, _ = measure(config, saved=None)
    if code := pretrain(config, again="the same command and"):
        return code
    result = summarise(config, folder, before)
    write_text(folder / "demo.json", json.dumps(result, indent=1) + "\n")
    print(as_table(result))
    return 0


def free_folder(parent: Path) -> Path:
    """parent/demo, or the first of demo-2, demo-3, ... that does not exist."""
    path = parent / "demo"
    for number in itertools.count(2):
        if not path.exists():
            return path
        path = parent / f"demo-{number}"


def check_folder(folder: Path, seed: int) -> None:
    """Raises ValueError when `folder` holds a run with another seed, or anything else that is not a demo's."""
    path = folder / "config.yaml"
    if not path.exists():
        if folder.is_dir() and any(not file.name.startswith("images-") for file in folder.iterdir()):
            raise ValueError(f"{folder} holds something else than a demo: choose another --output")
        return
    earlier = load_recipe(str(path)).train.seed
    if earlier != seed:
        raise ValueError(f"{folder} holds a demo with --seed {earlier}: choose another --output for --seed {seed}")


def draw_images(folder: Path, seed: int) -> str:
    """Draws the images into `folder` unless they are there; returns it."""
    if not folder.exists():
        print(f"drawing {sum(IMAGES):,} images into {folder}", file=sys.stderr)
        write_demo_images(folder, seed, *IMAGES)
    return str(folder)


def make_demo_config(options: DemoOptions, folder: Path, data: str) -> Config:
    """The settings of the run: as many epochs as see IMAGES_SEEN images, or a part of one."""
    num_images = len(find_images(data).paths)
    splits = SETTINGS["bn_splits"]
    batch = min(BATCH, num_images // splits * splits)
    if batch == 0:
        raise ValueError(f"{data} holds only {counted(num_images, 'image')}: the demo needs at least {splits}")
    steps = max(1, IMAGES_SEEN // batch)
    epochs = max(1, round(steps / (num_images // batch)))
    return replace(
        Config(data=data),
        **SETTINGS,
        batch_size=batch,
        epochs=epochs,
        steps=steps,
        knn_every=max(1, epochs // 4),
        log_every=min(20, steps),
        output=str(folder),
        resume="auto" if checkpoint.saved_steps(folder / "checkpoints") else "no",
        seed=options.seed,
        device=options.device,
    )


def measure(config: Config, saved: Path | None) -> tuple[dict[str, float], str]:
    """k-NN accuracy in percent by name (empty without classes), and one sentence on how it is measured.

    Without `saved`: that of raw pixels and of the untrained encoder; else that of the checkpoint's encoder.
    """
    ranks = distributed.start(config.train.device)
    with closing(open_loader(config, ranks)) as loader:
        probe, note = make_probe(config, loader, ranks)
        if probe is None:
            return {}, note
        moco, arch = make_trainee(config, ranks).moco, config.model.arch
        if saved is None:
            return {"raw pixels": probe(nn.Flatten()), f"untrained {arch}": probe(moco.encoder_q.backbone)}, note
        moco.load_state_dict(checkpoint.load(saved)["model"])
        return {f"pretrained {arch}": probe(moco.encoder_q.backbone)}, note


def summarise(config: Config, folder: Path, before: dict[str, float]) -> dict:
    """The contents of demo.json."""
    saved = next(iter(checkpoint.saved_steps(folder / "checkpoints").values()))
    after, note = measure(config, saved)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["images_per_second"] for line in lines if "images_per_second" in line]
    return {
        "knn_percent": {name: round(value, 2) for name, value in (before | after).items()},
        "measured": note,
        "images_seen": config.train.steps * config.train.batch_size,
        "images_per_second": round(median(speeds), 1),
        "seed": config.train.seed,
        "data": config.data,
        "curves": str(folder / "curves.png"),
        "views": str(folder / "views.png"),
        "checkpoint": str(saved),
    }


def as_table(result: dict) -> str:
    """The result as text."""
    knn = [f"  {name:<22}{value:5.1f} %" for name, value in result["knn_percent"].items()]
    seen, speed = result["images_seen"], result["images_per_second"]
    return "\n".join(
        [
            "",
            "k-NN accuracy" if knn else result["measured"],
            *knn,
            "",
            f"  {'trained on':<12}{seen:,} images, {speed:,.0f} images/s",
            *(f"  {name:<12}{result[name]}" for name in ("curves", "views", "checkpoint")),
        ]
    )


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
