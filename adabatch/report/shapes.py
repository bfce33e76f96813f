"""Pictures of schedules: shapes and their bounds, a shape beside the norms behind it, and ways to extend a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import ArrayLike

from adabatch.report.style import COLORS, INK, heading, log_axis, log_ticks, prepare, short_number

MOST_POINTS = 4000
"""Points of a line that are drawn; more than a picture has pixels."""

REFERENCE = "#999999"
"""Colour of lines that are only there for comparison."""

# Dashes distinguish lines that lie on each other, also in black and white.
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 1.5, 2)), (0, (1, 1)), (0, (9, 2, 2, 2, 2, 2)))


class Line(NamedTuple):
    """A line of a panel.

    Args:
        label: its name in the legend; lines of one label have one colour.
        x, y: shape (n,); NaN leaves a gap.
        style: "line" or "dots" in the colour of its label, or a grey line as "reference".
    """

    label: str
    x: ArrayLike
    y: ArrayLike
    style: Literal["line", "dots", "reference"] = "line"


class Mark(NamedTuple):
    """A point of a panel, with a word beside it."""

    label: str
    x: float
    y: float
    text: str = ""


class Panel(NamedTuple):
    """One panel of a picture.

    Args:
        title: what it shows, with the unit.
        lines: the lines, from back to front.
        marks: points on top of the lines.
        x_title: title of the x axis; only needed for the last panel and for panels with their own x axis.
        note: how to read the panel.
        log: which axes are logarithmic: "", "x", "y" or "xy".
        top: upper end of the y axis; None shows everything.
        own_x: whether the panel has its own x axis.
    """

    title: str
    lines: Sequence[Line]
    marks: Sequence[Mark] = ()
    x_title: str = ""
    note: str = ""
    log: str = ""
    top: float | None = None
    own_x: bool = False


def draw_panels(panels: Sequence[Panel], out: str | os.PathLike[str], *, title: str | None = None) -> Path:
    """Write a PNG with the panels below each other and one legend for all.

    Args:
        panels: from top to bottom.
        out: the PNG file; an existing one is overwritten.
        title: a heading.

    Returns:
        ``out`` as a path.
    """
    path = Path(out)
    compose_panels(panels, title=title).savefig(path, format="png")
    return path


def compose_panels(panels: Sequence[Panel], *, title: str | None = None) -> Figure:
    """The picture as a matplotlib figure with its own Agg canvas; pyplot's state is not touched.

    Raises:
        ValueError: if there are no panels.
    """
    if not panels:
        raise ValueError("a picture needs at least one panel, got none")
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    figure = Figure(figsize=(8, 0.8 + 3.1 * len(panels)), dpi=150, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    styles = _styles(panels)
    shared: Axes | None = None
    for number, panel in enumerate(panels, 1):
        # not subplots(sharex=True), which takes all panels or none
        axes = figure.add_subplot(len(panels), 1, number, sharex=None if panel.own_x else shared)
        if not panel.own_x:
            shared = shared or axes
        prepare(axes)
        _fill(axes, panel, styles)
    handles = [Line2D([], [], **style) for style in styles.values()]
    if len(handles) > 1:
        longest = max(map(len, styles))
        # as many columns as the longest label leaves room for
        columns = max(1, min(len(handles), 100 // (longest + 8)))
        figure.legend(
            handles, list(styles), loc="outside lower center", ncols=columns, frameon=False, fontsize=10, handlelength=3
        )
    if title:
        figure.suptitle(title, fontsize=13, color=INK)
    return figure


def _styles(panels: Sequence[Panel]) -> dict[str, dict[str, Any]]:
    """Colour and dashes of each label, in the order of appearance."""
    styles: dict[str, dict[str, Any]] = {}
    for line in (line for panel in panels for line in panel.lines):
        if line.label in styles:
            continue
        if line.style == "reference":
            styles[line.label] = {"color": REFERENCE, "linestyle": "-", "linewidth": 1.5}
            continue
        # grey lines use up no colour
        place = sum(style["color"] != REFERENCE for style in styles.values())
        styles[line.label] = {
            "color": COLORS[place % len(COLORS)], "linestyle": DASHES[place % len(DASHES)], "linewidth": 2.0
        }  # fmt: skip
    return styles


def _fill(axes: Axes, panel: Panel, styles: dict[str, dict[str, Any]]) -> None:
    heading(axes, panel.title, panel.note)
    for line in panel.lines:
        _draw(axes, line, styles[line.label])
    _scale_y(axes, panel)
    _scale_x(axes, panel)
    for mark in panel.marks:
        color = styles[mark.label]["color"]
        axes.plot(mark.x, mark.y, "o", color=color, markersize=8, markeredgecolor="white", zorder=10)
        axes.annotate(
            mark.text,
            (mark.x, mark.y),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=10,
            color=color,
        )


def _draw(axes: Axes, line: Line, style: dict[str, Any]) -> None:
    x, y = np.asarray(line.x, dtype=np.float64), np.asarray(line.y, dtype=np.float64)
    if line.style == "dots":
        # Finer with more points, so that thousands do not merge into one block.
        fine = min(1.0, (1000 / max(1, x.size)) ** 0.5)
        size, alpha = 3 + 3 * fine, 0.08 + 0.27 * fine
        axes.plot(x, y, ".", color=style["color"], markersize=size, markeredgewidth=0, alpha=alpha)
        return
    if x.size > MOST_POINTS:
        kept = np.linspace(0, x.size - 1, MOST_POINTS).astype(np.int64)
        x, y = x[kept], y[kept]
    axes.plot(x, y, **style)


def _scale_y(axes: Axes, panel: Panel) -> None:
    values = np.concatenate([np.asarray(line.y, dtype=np.float64) for line in panel.lines])
    if panel.top is not None:
        values = values[values <= panel.top]
    if "y" in panel.log:
        log_axis(axes, values, base=10)
        if panel.top is not None:
            axes.set_ylim(top=panel.top)
        return
    lowest, highest = min(0.0, float(np.nanmin(values))), float(np.nanmax(values))
    axes.set_ylim(lowest, highest + 0.06 * (highest - lowest))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))


def _scale_x(axes: Axes, panel: Panel) -> None:
    reach = np.concatenate([np.asarray(line.x, dtype=np.float64) for line in panel.lines])
    low, high = float(reach.min()), float(reach.max())
    if "x" in panel.log:
        axes.set_xscale("log")
        log_ticks(axes.xaxis, low, high, base=10)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(8, steps=(1, 2, 5, 10)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value, like=high)))
    if panel.x_title:
        axes.set_xlabel(panel.x_title, fontsize=11, color=INK)
