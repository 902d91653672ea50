"""Draws a result: a panel for each setting, with a bar and its spread for each contestant."""

from __future__ import annotations

import textwrap
from pathlib import Path

from fastssl.bench.results import Row, number

WIDE = 20.0  # ratio of the longest to the shortest bar above which the axis is logarithmic


def plot(rows: list[Row], title: str, path: Path) -> None:
    """Draws the rows and writes a PNG."""
    from matplotlib.figure import Figure

    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    heights = [0.9 + 0.34 * len(found) for found in groups.values()]
    figure = Figure(figsize=(9, sum(heights) + 0.6), layout="constrained")
    figure.suptitle(textwrap.fill(title, 120), fontsize=8)
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (group, found) in zip(panels, groups.items()):
        draw_panel(panel, group, found)
    figure.savefig(path, dpi=110)


def draw_panel(panel, group: str, rows: list[Row]) -> None:
    """Draws the bars of one setting, in the order of the table; ours in another colour."""
    names, middle = [row.name for row in rows], [row.value.median for row in rows]
    below = [abs(row.value.median - row.value.low) for row in rows]
    above = [abs(row.value.high - row.value.median) for row in rows]
    colours = ["tab:blue" if row.name.startswith(("ours", "all", "step")) else "0.7" for row in rows]
    panel.barh(range(len(rows)), middle, xerr=(below, above), color=colours, ecolor="0.25", capsize=3, height=0.7)
    panel.set_yticks(range(len(rows)), names, fontsize=8)
    panel.invert_yaxis()
    for place, row in enumerate(rows):
        panel.annotate(f" {number(row.value.median)}", (row.value.high, place), va="center", fontsize=8)
    if max(middle) > WIDE * min(middle):
        panel.set_xscale("log")
    panel.margins(x=0.12)
    better = "more" if rows[0].higher_is_better else "less"
    panel.set_title(f"{group}: {rows[0].unit}, {better} is better", fontsize=9, loc="left")
    panel.spines[["top", "right"]].set_visible(False)
