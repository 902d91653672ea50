"""curves.png: the loss terms, the k-NN accuracy and the learning rate of a run, from its metrics.jsonl."""

from __future__ import annotations

import json
import os
from pathlib import Path

from matplotlib.figure import Figure

PANELS = (("loss",), ("contrast", "align", "uniform"), ("knn",), ("top1", "top5"), ("lr",), ("feature_std",))


def draw_curves(metrics: Path, picture: Path) -> None:
    """Draws each panel that has values over the steps; writes the PNG whole or not at all."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    panels = [names for names in PANELS if any(name in line for line in lines for name in names)]
    if not panels:
        return
    figure = Figure(figsize=(5 * min(3, len(panels)), 3.2 * -(-len(panels) // 3)), layout="constrained")
    axes = figure.subplots(-(-len(panels) // 3), min(3, len(panels)), squeeze=False).flat
    for names, axis in zip(panels, axes):
        for name in names:
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            if points:
                axis.plot(*zip(*points), label=name, linewidth=1.2, marker="." if len(points) < 30 else "")
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    for axis in list(axes):
        axis.set_visible(False)  # the row's unused places
    partial = picture.with_name(picture.name + ".partial")
    figure.savefig(partial, dpi=110, format="png")
    os.replace(partial, picture)
