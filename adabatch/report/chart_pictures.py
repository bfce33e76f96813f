"""The charts of a report as pictures, one each, from the numbers that the page draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from adabatch.report.charts import AXES, Run
from adabatch.report.evaluations import Floats
from adabatch.report.reason_colors import reason_colors
from adabatch.report.style import COLORS, FAINT_INK, INK, any_finite, log_ticks, prepare, short_number

STRIP = 0.055
"""Height of the strip of reasons of one run, as a share of the panel's."""

Draw = Callable[[Run, "Brush"], None]


class Brush:
    """Draws the numbers of one run over one axis.

    Args:
        panel: where it draws.
        run: the numbers.
        color: of the run.
        over: name of the axis.

    Attributes:
        steers: the values that the axis must show; bands and single estimates have no bound, and may be cut off.
    """

    def __init__(self, panel: Axes, run: Run, color: str, over: str) -> None:
        self._panel, self._run, self.color, self._over = panel, run, color, over
        self.x = floats(run["x"][over])
        self.end = float(run["end"][over])
        self.steers: list[Floats] = []

    def line(self, values: Sequence[float | None], *, steers: bool = True, gaps: bool = False, **style: Any) -> None:
        """A line through the values that are known; with ``gaps`` it is interrupted where they are not."""
        y = floats(values)
        known = np.full(len(y), True) if gaps else np.isfinite(y)
        self._panel.plot(self.x[known], y[known], **self._style(style))
        self._see(y, steers)

    def stairs(self, values: Sequence[float | None], *, steers: bool = True, **style: Any) -> None:
        """Values that hold from one step to the next."""
        y = floats(values)
        # the last value holds until the end of the run, which has no step of its own
        self._panel.step(np.append(self.x, self.end), np.append(y, y[-1]), where="post", **self._style(style))
        self._see(y, steers)

    def dots(self, values: Sequence[float | None]) -> None:
        """Values of single steps."""
        self._panel.plot(self.x, floats(values), ".", color=self.color, markersize=4, alpha=0.35, markeredgewidth=0)

    def band(self, low: Sequence[float | None], high: Sequence[float | None], *, alpha: float = 0.16) -> None:
        """The area between two bounds; an upper bound of -1 stands for infinity."""
        upper = floats(high)
        # fill_between leaves a hole where a bound is infinite
        upper = np.where(upper < 0, 1e30, upper)
        self._panel.fill_between(self.x, floats(low), upper, color=self.color, alpha=alpha, linewidth=0)

    def evaluations(self, name: str) -> None:
        """The values of a metric, if the run has it."""
        for metric in self._run["metrics"]:
            if metric["name"] == name and metric["x"][self._over] is not None:
                x, y = floats(metric["x"][self._over]), floats(metric["y"])
                known = np.isfinite(y)
                self._panel.plot(x[known], y[known], "o--", color=self.color, linewidth=1.2, markersize=4)
                self._see(y, steers=True)

    def level(self, value: float) -> None:
        """A limit."""
        self._panel.plot([0, self.end], [value, value], color=FAINT_INK, linewidth=1, linestyle="--")
        self._see(np.array([value]), steers=True)

    def _style(self, style: dict[str, Any]) -> dict[str, Any]:
        return {"color": self.color, "linewidth": 1.6, **style}

    def _see(self, values: Floats, steers: bool) -> None:
        if steers:
            self.steers.append(values)


def write_pictures(said: Mapping[str, Any], folder: Path, *, over: str = "examples") -> list[Path]:
    """Writes a PNG for each chart of a report.

    Args:
        said: the numbers of the page (``page.drawn``).
        folder: where the pictures go; it exists.
        over: the axis, of ``AXES``.

    Raises:
        ValueError: if no run counts that.
    """
    runs = [(run, COLORS[index % len(COLORS)]) for index, run in enumerate(said["runs"]) if run["x"].get(over)]
    if not runs:
        need = {"tokens": "--tokens_per_example=N", "time": "a criterion that reads step times, such as Goodput"}
        raise ValueError(f"no run counts {over}, which needs {need.get(over, 'another axis')}: draw over examples")
    written = []
    for name, chart in said["charts"].items():
        path = folder / f"{name}.png"
        _chart(name, chart, runs, said["reason_kinds"], over).savefig(path)
        written.append(path)
    heats = [(run, color) for run, color in runs if run["heat"]]
    for number, (run, _) in enumerate(heats):
        path = folder / (f"layers{number}.png" if len(heats) > 1 else "layers.png")
        _heat(run, over).savefig(path)
        written.append(path)
    return written


def floats(values: Sequence[float | None]) -> Floats:
    """Numbers of the page; NaN for those that are None."""
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def _chart(
    name: str, chart: Mapping[str, Any], runs: list[tuple[Run, str]], kinds: Mapping[str, str], over: str
) -> Figure:
    figure, panel = _figure(chart["title"], chart["note"])
    brushes = [Brush(panel, run, color, over) for run, color in runs]
    for (run, _), brush in zip(runs, brushes, strict=True):
        if name in DRAWN:
            DRAWN[name](run, brush)
        else:
            brush.evaluations(chart["metric"])
    end = max(brush.end for brush in brushes)
    _x_axis(panel, end, over)
    values = np.concatenate([value for brush in brushes for value in brush.steers] or [np.array([])])
    if any_finite(panel, values, chart["empty"]):
        _y_axis(panel, values, chart)
    handles: list[Artist] = [
        Line2D([], [], color=color, linewidth=2.5, label=run["name"]) for run, color in runs if len(runs) > 1
    ]
    if name == "batch":
        seen = [
            _strip(panel, run, brush, row, kinds)
            for row, ((run, _), brush) in enumerate(zip(runs, brushes, strict=True))
        ]
        # room for the strips, which lie between the axis and its labels
        panel.tick_params(axis="x", pad=4 + 11 * len(runs))
        handles += [
            Patch(color=color, label=kind) for kind, color in reason_colors().items() if any(kind in s for s in seen)
        ]
    if handles:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(len(handles), 5), frameon=False, fontsize=9
        )
    return figure


def _batch(run: Run, brush: Brush) -> None:
    brush.band(run["low"], run["high"], alpha=0.12)
    brush.line(run["wanted"], steers=False, alpha=0.45, linewidth=1.2)
    for limit in run["limits"]:
        if limit is not None:
            brush.level(limit)
    brush.stairs(run["batch"], linewidth=2)


def _loss(run: Run, brush: Brush) -> None:
    brush.dots(run["loss"])
    brush.line(run["smooth_loss"])
    brush.evaluations("loss")


def _noise(run: Run, brush: Brush) -> None:
    if run["noise_low"]:
        brush.band(run["noise_low"], run["noise_high"])
    brush.dots(run["measured"])
    brush.stairs(run["batch"], steers=False, linewidth=1, linestyle="--", alpha=0.8)
    brush.line(run["noise_scale"], gaps=True)


def _groups(key: str, *, stairs: bool) -> Draw:
    """One line per parameter group or beta, the first in full colour."""

    def draw(run: Run, brush: Brush) -> None:
        for number, values in enumerate(run[key] or ()):
            (brush.stairs if stairs else brush.line)(values, alpha=0.5 if number else 1.0)

    return draw


def _one(key: str, *, stairs: bool = False, **style: Any) -> Draw:
    def draw(run: Run, brush: Brush) -> None:
        if run[key]:
            (brush.stairs if stairs else brush.line)(run[key], **style)

    return draw


DRAWN: Mapping[str, Draw] = MappingProxyType(
    {
        "batch": _batch,
        "loss": _loss,
        "noise": _noise,
        "efficiency": _one("efficiency", gaps=True),
        "lr": _groups("applied_lr", stairs=False),
        "shape": _one("shape"),
        "factor": _one("factor", stairs=True),
        "tau": _one("tau"),
        "betas": _groups("betas", stairs=True),
        "freedom": _one("freedom"),
    }
)
"""What each chart shows of a run; all others show a metric of the evaluations."""


def _figure(title: str, note: str, *, height: float = 3.8) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9, height), dpi=150, facecolor="white", layout="constrained")
    # its own canvas: pyplot, and with it the user's figures, is not touched
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    prepare(panel)
    panel.set_title(f"{title}\n", loc="left", fontsize=12, color=INK)
    panel.text(0, 1.02, note, transform=panel.transAxes, fontsize=9, color=FAINT_INK, va="bottom")
    return figure, panel


def _x_axis(panel: Axes, end: float, over: str) -> None:
    panel.set_xlim(0, end)
    panel.xaxis.set_major_locator(MaxNLocator(8, steps=(1, 2, 5, 10)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value, like=end)))
    panel.set_xlabel(AXES[over], fontsize=10, color=INK, loc="right")


def _y_axis(panel: Axes, values: Floats, chart: Mapping[str, Any]) -> None:
    usable = values[np.isfinite(values) & ((values > 0) if chart["log"] else True)]
    # quotients of estimates have outliers of any size, which must not set the axis
    low, high = np.quantile(usable, (chart["trim"], 1 - chart["trim"])).tolist() if usable.size else (1.0, 1.0)
    if chart["log"]:
        margin = max((high / low) ** 0.08, 1.25)
        panel.set_yscale("log", base=chart["log"])
        panel.set_ylim(low / margin, high * (chart["headroom"] or margin))
        log_ticks(panel.yaxis, low, high, base=chart["log"])
        return
    low = low if chart["start"] is None else min(chart["start"], low)
    # a constant value still gets an axis with a height
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    panel.set_ylim(low if low == chart["start"] else low - margin, high + margin)
    panel.yaxis.set_major_locator(MaxNLocator(5))
    panel.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{100 * value:.0f} %" if chart["percent"] else short_number(value))
    )


def _strip(panel: Axes, run: Run, brush: Brush, row: int, kinds: Mapping[str, str]) -> set[str]:
    """The reasons of a run as a strip of colours below the panel; returns which kinds there are."""
    found = [kinds.get(reason, "not asked") for reason in run["reason"]]
    # one bar per stretch of equal reasons, not one per step
    starts = [0, *(at for at in range(1, len(found)) if found[at] != found[at - 1])]
    edges = np.append(brush.x[starts], brush.end)
    panel.broken_barh(
        [(left, right - left) for left, right in pairwise(edges.tolist())],
        (-(row + 1) * STRIP - 0.01, 0.8 * STRIP),
        facecolors=[reason_colors()[found[at]] for at in starts],
        transform=panel.get_xaxis_transform(),
        clip_on=False,
    )
    return set(found)


def _heat(run: Run, over: str) -> Figure:
    heat, chart = run["heat"], run["heat_chart"]
    names = heat["names"]
    figure, panel = _figure(chart["title"], chart["note"], height=1.6 + 0.22 * len(names))
    panel.grid(visible=False)
    values = np.array([floats(row) for row in heat["values"]])
    panel.pcolormesh(
        floats(heat["x"][over]),
        np.arange(len(names) + 1),
        # -1 is "no signal", drawn in grey below the colours
        np.where(values < 0, 1.0, np.nan),
        cmap="Greys",
        vmax=3,
        vmin=0,
    )
    positive = values[np.isfinite(values) & (values > 0)]
    if any_finite(panel, positive, "no positive estimate"):
        # as on the axes of the charts, outliers must not take the whole range of colours
        low, high = np.quantile(positive, (0.02, 0.98)).tolist()
        shown = panel.pcolormesh(
            floats(heat["x"][over]),
            np.arange(len(names) + 1),
            np.where(values > 0, values, np.nan),
            # LogNorm needs two different ends
            norm=LogNorm(low, max(high, 1.01 * low)),
            cmap="viridis",
        )
        bar = figure.colorbar(shown, ax=panel, label="examples")
        log_ticks(bar.ax.yaxis, low, high, base=10)
    _x_axis(panel, float(run["end"][over]), over)
    labels = [f"{name}  {100 * (share or 0):.0f} %" for name, share in zip(names, heat["shares"], strict=True)]
    panel.set_yticks(np.arange(len(names)) + 0.5, labels=labels, fontsize=8)
    # the layer with the most noise on top
    panel.invert_yaxis()
    return figure
