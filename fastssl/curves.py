"""Draws a run's curves.png (loss terms, k-NN accuracy, learning rate, ...) from its metrics.jsonl."""

from __future__ import annotations

import json
import math
from pathlib import Path

from fastssl.data_prep.files import written_whole

PANELS = (("loss",), ("contrast", "align", "uniform"), ("knn",), ("top1", "top5"), ("lr",), ("feature_std",))
MOST_COLUMNS = 3


def draw_curves(metrics: Path, picture: Path) -> None:
    """Draws every panel that has values, over the steps; the PNG appears whole or not at all."""
    from matplotlib.figure import Figure  # half a second, which only the rank that draws spends

    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    panels = [names for names in PANELS if any(name in line for line in lines for name in names)]
    if not panels:
        return
    rows, columns = math.ceil(len(panels) / MOST_COLUMNS), min(MOST_COLUMNS, len(panels))
    figure = Figure(figsize=(5 * columns, 3.2 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for names, axis in zip(panels, axes):
        for name in names:
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            if points:
                axis.plot(*zip(*points), label=name, linewidth=1.2, marker="." if len(points) < 30 else "")
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    for unused in axes[len(panels) :]:
        unused.set_visible(False)
    with written_whole(picture) as partial:
        figure.savefig(partial, dpi=110, format="png")
