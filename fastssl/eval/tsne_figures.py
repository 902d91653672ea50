"""The two figures of a t-SNE: all originals by class; and one class, each image joined to its views by a triangle."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastssl.data_prep.files import written_whole

SIDE = 10  # inches
BACKGROUND, INSET = "lavender", "lightsteelblue"
ORIGINAL, VIEW = "navy", "firebrick"


def draw_space(coordinates: dict[str, np.ndarray], ax: Axes | None = None) -> Figure:
    """The originals, coloured by class. ax: where to draw; by default a new figure."""
    figure, ax = new_axes(coordinates, ax)
    labels = coordinates["labels"]
    classes = np.unique(labels)
    colours = matplotlib.colormaps["jet"](np.searchsorted(classes, labels) / max(1, len(classes) - 1))
    ax.scatter(*coordinates["Y0"].T, c=colours)
    return figure


def draw_class(coordinates: dict[str, np.ndarray], zoom: bool = False, ax: Axes | None = None) -> Figure:
    """The first class: originals, views, and a triangle for each image. zoom: adds an inset around the smallest one."""
    figure, ax = new_axes(coordinates, ax)
    first = coordinates["labels"] == coordinates["labels"].min()
    corners = np.stack([coordinates[name][first] for name in ("Y0", "Y1", "Y2")], 1)  # (n, 3, 2)
    draw_triangles(ax, corners)
    if zoom:
        centre, half = tightest(corners)
        inset = ax.inset_axes((0.0, 0.0, 0.5, 0.5), xticks=[], yticks=[], facecolor=INSET)
        draw_triangles(inset, corners)
        inset.set_xlim(centre[0] - half, centre[0] + half)
        inset.set_ylim(centre[1] - half, centre[1] + half)
        ax.indicate_inset_zoom(inset, edgecolor="black", linestyle="--", linewidth=3)
        inset.text(0.05, 0.9, "augmented views", fontsize=18, transform=inset.transAxes)
    return figure


def draw_triangles(ax: Axes, corners: np.ndarray) -> None:
    """Draws points and triangles. corners: (n, 3, 2), the places of (original, view 1, view 2)."""
    closed = corners[:, [0, 1, 2, 0]]
    ax.plot(closed[..., 0].T, closed[..., 1].T, color="black", linewidth=1)
    ax.scatter(*corners[:, 0].T, c=ORIGINAL, alpha=0.5, zorder=3)
    ax.scatter(*corners[:, 1:].reshape(-1, 2).T, c=VIEW, alpha=0.5, zorder=3)


def tightest(corners: np.ndarray) -> tuple[np.ndarray, float]:
    """(centre, half the side) of a square around the triangle whose longest side is the shortest."""
    size = np.linalg.norm(corners - np.roll(corners, 1, axis=1), axis=2).max(1)
    i = int(size.argmin())
    return corners[i].mean(0), max(1.2 * float(size[i]), 1e-3 * float(np.ptp(corners)), 1e-9)


def new_axes(coordinates: dict[str, np.ndarray], ax: Axes | None) -> tuple[Figure, Axes]:
    """`ax`, or those of a new square figure, without ticks and with limits that hold all originals and views."""
    if ax is None:
        ax = Figure(figsize=(SIDE, SIDE)).add_subplot()
    points = np.concatenate([coordinates[name] for name in ("Y0", "Y1", "Y2")])
    low, high = points.min(0), points.max(0)
    margin = 0.05 * (high - low) + 1e-9
    ax.set(
        xlim=(low[0] - margin[0], high[0] + margin[0]),
        ylim=(low[1] - margin[1], high[1] + margin[1]),
        xticks=[],
        yticks=[],
        facecolor=BACKGROUND,
    )
    return ax.figure, ax


def save_figure(figure: Figure, name: str) -> list[str]:
    """Writes <name>.pdf and <name>.png, each under its name only when it is complete; returns their names."""
    names = []
    for kind in ("pdf", "png"):
        path = Path(f"{name}.{kind}")
        with written_whole(path) as partial:
            figure.savefig(partial, format=kind)
        names.append(str(path))
    return names
