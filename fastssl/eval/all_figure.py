"""The page of figures that `fastssl eval all` draws."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastssl.eval.tsne_figures import draw_class, draw_space

PAGE = (12, 16)  # inches


def draw_page(result: dict, coordinates: dict[str, np.ndarray] | None) -> Figure:
    """k-NN and linear accuracy; with the t-SNE `coordinates` of a view set, also what was found on that."""
    figure = Figure(figsize=PAGE if coordinates else (PAGE[0], PAGE[1] / 3), layout="constrained")
    axes = figure.subplots(3 if coordinates else 1, 2, squeeze=False)
    draw_knn(axes[0, 0], result["knn"])
    draw_linear(axes[0, 1], result["linear"])
    if coordinates:
        draw_discrimination(axes[1, 0], result["instdisc"])
        draw_stats(axes[1, 1], result["stats"])
        draw_space(coordinates, axes[2, 0])
        axes[2, 0].set_title("t-SNE of the originals, by class")
        draw_class(coordinates, ax=axes[2, 1])
        axes[2, 1].set_title("t-SNE of one class: originals and views")
    return figure


def draw_knn(ax: Axes, found: dict) -> None:
    """Accuracy against k, for both votes."""
    for label, accuracy in (("majority", found["accuracy"]), ("weighted", found["weighted_accuracy"])):
        ax.plot(list(accuracy), list(accuracy.values()), marker=".", label=label)
    ax.set(title=f"k-NN ({found['rep_space']}): {found['best']:.2f} % at k = {found['best_k']}", xlabel="k", ylabel="%")
    ax.legend()


def draw_linear(ax: Axes, found: dict) -> None:
    """Accuracy against learning rate, one line for each weight decay; settings that diverged are left out."""
    for wd in dict.fromkeys(r["weight_decay"] for r in found["settings"]):
        points = [(r["lr"], r["acc1"]) for r in found["settings"] if r["weight_decay"] == wd and r["acc1"] is not None]
        if points:
            ax.semilogx(*zip(*points), marker="o", label=f"weight decay {wd:g}")
    ax.set(title=f"linear, cached: {found['acc1']:.2f} %", xlabel="learning rate", ylabel="Acc1 %")
    ax.legend()


def draw_discrimination(ax: Axes, found: dict) -> None:
    """Acc@k against k, for both modes."""
    for mode, accuracy in found.items():
        ax.plot(range(1, len(accuracy) + 1), accuracy, marker="o", label=mode)
    ax.set(title="instance discrimination", xlabel="k", ylabel="Acc@k %")
    ax.legend()


def draw_stats(ax: Axes, found: dict) -> None:
    """Alignment and uniformity as bars with their values."""
    shown = {name: value for name, value in found.items() if isinstance(value, float)}
    bars = ax.barh(list(shown), list(shown.values()))
    ax.bar_label(bars, fmt="%.4f", padding=3)
    ax.invert_yaxis()
    ax.margins(x=0.25)
    ax.set_title("alignment and uniformity")
