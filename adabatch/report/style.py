"""The style of all pictures of the package: colours, axes, headings and tick labels."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

# Okabe and Ito's palette, which the common kinds of colour blindness keep apart (Wong, Nature Methods 2011).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK, FAINT_INK, GRID = "#222222", "#666666", "#E3E3E3"


def short_number(value: float, *, like: float | None = None) -> str:
    """A number as a tick label: 3e-4, 0.02, 512, 1,024, 60 k, 1.5 M; in the unit of ``like``, if given."""
    size = abs(value if like is None else like)
    if value == 0:
        return "0"
    for unit, least, name in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e3, 1e4, "k")):
        if size >= least:
            return f"{value / unit:.4g} {name}"
    if size < 1e-3:
        # 3e-4, not 3e-04
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"


def prepare(panel: Axes) -> None:
    """Styles an empty panel: two faint spines, a grid behind everything, no margin along x."""
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        panel.spines[side].set_color("#999999")
    panel.set_axisbelow(True)
    panel.grid(True, color=GRID, linewidth=0.8)
    panel.tick_params(labelsize=10, color="#999999", labelcolor=INK)
    panel.margins(x=0)


def heading(panel: Axes, text: str, note: str = "", *, pad: float = 6) -> None:
    """Writes the title of a panel at its top left and a note at its top right, ``pad`` points above the axes."""
    panel.set_title(text, loc="left", fontsize=11, color=INK, pad=pad)
    if note:
        panel.set_title(note, loc="right", fontsize=9, color=FAINT_INK, pad=pad)


def any_finite(panel: Axes, values: NDArray[np.float64], otherwise: str) -> bool:
    """Whether there is something to draw; if not, the panel says so."""
    if np.isfinite(values).any():
        return True
    panel.text(0.5, 0.5, otherwise, transform=panel.transAxes, ha="center", va="center", color=FAINT_INK)
    panel.yaxis.set_major_locator(NullLocator())
    return False


def positive_or_nan(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The values, with NaN for those that a log axis cannot show."""
    return np.where((values > 0) & np.isfinite(values), values, np.nan)


def log_axis(panel: Axes, values: NDArray[np.float64], *, base: int) -> None:
    """Makes the y axis logarithmic, for all positive values, with plain numbers as tick labels."""
    positive = values[np.isfinite(values) & (values > 0)]
    low, high = float(positive.min()), float(positive.max())
    panel.set_yscale("log", base=base)
    # at least a quarter of an octave, so that a constant value gets an axis with a height
    margin = max((high / low) ** 0.06, 2**0.25)
    panel.set_ylim(low / margin, high * margin)
    log_ticks(panel.yaxis, low, high, base=base)


def log_ticks(axis: Axis, low: float, high: float, *, base: int) -> None:
    """Puts plain numbers at powers of the base, and in between if an axis of base 10 has few of them."""
    subs: tuple[float, ...] = (1,)
    if base == 10 and high <= 100 * low:
        subs = (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 5, 7)
    axis.set_major_locator(LogLocator(base=base, subs=subs, numticks=7))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
