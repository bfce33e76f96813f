"""A run in one picture: batch size, learning rate, noise scale and loss against examples."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from adabatch.report.curves import Curves, JournalSource, moving_mean, read_curves
from adabatch.report.layers import layer_panel
from adabatch.report.style import COLORS, INK, any_finite, heading, log_axis, positive_or_nan, prepare, short_number
from adabatch.report.summary import LOSS_WINDOW

Fill = Callable[[Axes, Sequence[Curves], Sequence[str]], None]
"""Draws all runs, each in its colour, into a panel."""


def write_picture(
    runs: JournalSource | Mapping[str, JournalSource], out: str | os.PathLike[str], *, title: str | None = None
) -> Path:
    """The implementation of ``adabatch.report.draw``, with the same arguments."""
    labelled = dict(runs) if isinstance(runs, Mapping) else {"": runs}
    if not labelled:
        raise ValueError("draw needs at least one run, got none")
    figure = compose({label: read_curves(journal) for label, journal in labelled.items()}, title=title)
    path = Path(out)
    figure.savefig(path, format="png")
    return path


def compose(runs: Mapping[str, Curves], *, title: str | None = None) -> Figure:
    """The picture as a matplotlib figure with its own Agg canvas; pyplot's state is not touched."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    curves = list(runs.values())
    colors = [COLORS[i % len(COLORS)] for i in range(len(curves))]
    fills: list[tuple[Fill, float]] = [(_batch, 1.0), (_learning_rate, 0.8), (_noise_scale, 1.0), (_loss, 1.0)]
    layered = next((label for label, run in runs.items() if run.layers), None)
    if layered is not None:
        fills.insert(3, (lambda panel, *_: layer_panel(panel, runs[layered], label=layered), 1.4))
    heights = [height for _, height in fills]
    figure = Figure(figsize=(8, 10 * sum(heights) / 3.8), dpi=150, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(fills), 1, sharex=True, height_ratios=heights)
    for panel, (fill, _) in zip(panels, fills, strict=True):
        prepare(panel)
        fill(panel, curves, colors)
    bottom = panels[-1]
    bottom.set_xlabel("examples", fontsize=11, color=INK)
    end = max(run.end for run in curves)
    bottom.set_xlim(0, end)
    bottom.xaxis.set_major_locator(MaxNLocator(8, steps=(1, 2, 5, 10)))
    bottom.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value, like=end)))
    labels = [label for label in runs if label]
    if labels:
        handles = [Line2D([], [], color=color, linewidth=2.5) for color in colors]
        figure.legend(
            handles,
            list(runs),
            loc="outside lower center",
            ncols=min(len(labels), 3),
            frameon=False,
            fontsize=11,
        )
    if title:
        figure.suptitle(title, fontsize=13, color=INK)
    return figure


def _batch(panel: Axes, curves: Sequence[Curves], colors: Sequence[str]) -> None:
    heading(panel, "global batch size (examples)")
    log_axis(panel, np.concatenate([run.batch for run in curves]), base=2)
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    for run, style in _styled(curves, colors):
        _stairs(panel, run, run.batch, **style)


def _learning_rate(panel: Axes, curves: Sequence[Curves], colors: Sequence[str]) -> None:
    heading(panel, "learning rate (applied)")
    rates = np.concatenate([run.lr.ravel() for run in curves])
    if not any_finite(panel, rates, "no learning rate in the journal"):
        return
    for run, style in _styled(curves, colors):
        # groups with equal rates would lie on each other
        for group in np.unique(run.lr, axis=1).T:
            _stairs(panel, run, group, **style)
    # from zero, so that heights can be compared
    panel.set_ylim(bottom=min(0.0, float(np.nanmin(rates))))
    panel.yaxis.set_major_locator(MaxNLocator(5))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))


def _noise_scale(panel: Axes, curves: Sequence[Curves], colors: Sequence[str]) -> None:
    lost = any(np.isinf(run.noise_scale_average).any() for run in curves)
    note = "dots: each step    line: averaged" + ("    gaps: averaged signal not positive" if lost else "")
    heading(panel, "noise scale (examples)", note)
    raw = positive_or_nan(np.concatenate([run.noise_scale for run in curves]))
    averages = positive_or_nan(np.concatenate([run.noise_scale_average for run in curves]))
    otherwise = "no positive estimate" if lost else "not measured"
    if not any_finite(panel, np.concatenate([raw, averages]), otherwise):
        return
    # A quotient of two estimates has arbitrarily large outliers, which must not set the axis.
    usual = [np.nanpercentile(part, (2, 98)) for part in (raw, averages) if np.isfinite(part).any()]
    log_axis(panel, np.concatenate(usual), base=10)
    for run, style in _styled(curves, colors):
        # Finer with more steps, so that thousands do not merge into one block.
        fine = min(1.0, (1000 / len(run.examples)) ** 0.5)
        dots = {"markersize": 3 + 3 * fine, "alpha": max(0.35 * fine, 0.03), "zorder": style["zorder"] - 1}
        line = {**style, "linewidth": max(style["linewidth"] * fine, 0.8)}
        panel.plot(run.examples, positive_or_nan(run.noise_scale), ".", color=style["color"], markeredgewidth=0, **dots)
        # The line joins the steps that were measured; its gaps are averaged signals that are not positive.
        measured = ~np.isnan(run.noise_scale_average)
        panel.plot(run.examples[measured], positive_or_nan(run.noise_scale_average[measured]), **line)


def _loss(panel: Axes, curves: Sequence[Curves], colors: Sequence[str]) -> None:
    note = f"faint: each step    line: mean over {100 * LOSS_WINDOW:g} % of the run"
    heading(panel, "training loss", note)
    losses = np.concatenate([run.loss for run in curves])
    if not any_finite(panel, losses, "no loss in the journal"):
        return
    window = LOSS_WINDOW * max(run.end for run in curves)
    means = [moving_mean(run, run.loss, window=window) for run in curves]
    everything = np.concatenate(means)
    # A loss that falls by more than a decade needs a log axis, and one with zeros a linear axis.
    if np.nanmin(everything) > 0 and np.nanmax(everything) > 10 * np.nanmin(everything):
        log_axis(panel, everything, base=10)
    else:
        panel.yaxis.set_major_locator(MaxNLocator(5))
    for (run, style), mean in zip(_styled(curves, colors), means, strict=True):
        known = np.isfinite(run.loss)
        faint = {"color": style["color"], "linewidth": 0.8, "alpha": 0.3, "zorder": style["zorder"] - 1}
        panel.plot(run.examples[known], run.loss[known], **faint)
        panel.plot(run.examples[np.isfinite(mean)], mean[np.isfinite(mean)], **style)


def _styled(curves: Sequence[Curves], colors: Sequence[str]) -> list[tuple[Curves, dict[str, Any]]]:
    """The runs with their styles. The first is on top, and a little thicker."""
    styles = [
        {"color": color, "linewidth": 2.0 if place == 0 else 1.5, "zorder": 3.0 + 2 * (len(curves) - place)}
        for place, color in enumerate(colors)
    ]
    return list(zip(curves, styles, strict=True))


def _stairs(panel: Axes, run: Curves, values: NDArray[np.float64], **style: Any) -> None:
    """A value that holds from the start of each step to its end."""
    panel.step(
        np.append(run.examples, run.examples[-1] + run.batch[-1]),
        np.append(values, values[-1]),
        where="post",
        **style,
    )
