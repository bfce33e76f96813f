"""The panel of the noise scale per layer: the layers with most of the noise by name, and all others in grey."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from adabatch.report.curves import Curves, moving_mean
from adabatch.report.style import COLORS, any_finite, heading, log_axis, positive_or_nan

MOST_LINES = 6
"""Entries in the legend, in two columns. If there are more layers, the last entry stands for the rest."""

LAYER_WINDOW = 0.1
OTHERS = "#BDBDBD"
COLUMNS = 2
LONGEST_NAME, LONGEST_LABEL = 32, 18
ROW_POINTS = 13.0
"""Height of a row of names above the axes."""


def layer_panel(panel: Axes, run: Curves, *, label: str) -> None:
    """Draw the noise scale of each layer of one run: mean noise over mean signal within 10 % of the run.

    Args:
        panel: an empty panel.
        run: a run with noise per layer.
        label: the label of the run; "" if there is only one run.
    """
    scales, shares = layer_scales(run), noise_shares(run)
    order = np.argsort(-shares, kind="stable")
    named = order if len(order) <= MOST_LINES else order[: MOST_LINES - 1]
    others = order[len(named) :]
    entries = len(named) + bool(len(others))
    note = f"%: of the noise    mean over {100 * LAYER_WINDOW:g} % of the run    gaps: no signal"
    of_run = f", {_shortened(label, LONGEST_LABEL)}" if label else " (examples)"
    heading(panel, f"noise scale by layer{of_run}", note, pad=8 + ROW_POINTS * math.ceil(entries / COLUMNS))
    # unlike for the whole gradient, estimates of single steps are left out: those of one layer are too noisy
    visible = positive_or_nan(scales)
    if not any_finite(panel, visible, "no positive estimate"):
        return
    # Quotients whose mean signal is near zero are arbitrarily large, so they must not set the axis.
    log_axis(panel, np.nanpercentile(visible, (1, 95)), base=10)
    for place, layer in enumerate(named):
        text = f"{100 * shares[layer]:.0f} %  {_shortened(run.layers[layer], LONGEST_NAME)}"
        _line(panel, run, scales[:, layer], color=COLORS[place], linewidth=1.6, zorder=4.0 - place / 10, label=text)
    for place, layer in enumerate(others):
        # one entry of the legend for all of them
        rest = f"{100 * shares[others].sum():.0f} %  {len(others)} others" if place == 0 else None
        _line(panel, run, scales[:, layer], color=OTHERS, linewidth=0.8, zorder=2.0, label=rest)
    panel.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=COLUMNS,
        frameon=False,
        fontsize=9,
        borderpad=0,
        borderaxespad=0.3,
        handlelength=1.2,
        labelspacing=0.25,
    )


def layer_scales(run: Curves) -> NDArray[np.float64]:
    """Mean noise over mean signal around each step, in examples; infinite if that signal is not positive.

    Returns:
        Shape (num_steps, num_layers); NaN at steps at which a layer was not measured.
    """
    scales = np.full_like(run.layer_noise, np.nan)
    for layer in range(len(run.layers)):
        noise, signal = run.layer_noise[:, layer], run.layer_signal[:, layer]
        both = np.isfinite(noise) & np.isfinite(signal)
        # wide, because the estimates of one layer are noisier than those of the whole gradient
        window = LAYER_WINDOW * run.end
        mean_noise = moving_mean(run, np.where(both, noise, np.nan), window=window)[both]
        mean_signal = moving_mean(run, np.where(both, signal, np.nan), window=window)[both]
        # infinite and not NaN: measured, but without a signal
        known = np.full(len(mean_noise), np.inf)
        np.divide(mean_noise, mean_signal, out=known, where=mean_signal > 0)
        scales[both, layer] = known
    return scales


def noise_shares(run: Curves) -> NDArray[np.float64]:
    """Each layer's share of the total noise, averaged over the run, shape (num_layers,)."""
    finite = np.isfinite(run.layer_noise)
    sums = np.where(finite, run.layer_noise, 0.0).sum(axis=0)
    means = np.maximum(sums / np.maximum(finite.sum(axis=0), 1), 0.0)
    total = float(means.sum())
    shares: NDArray[np.float64] = means / total if total > 0 else means
    return shares


def _line(panel: Axes, run: Curves, scales: NDArray[np.float64], **style: Any) -> None:
    """A line through the measured steps, with gaps where the signal is not positive."""
    measured = ~np.isnan(scales)
    panel.plot(run.examples[measured], positive_or_nan(scales[measured]), **style)


def _shortened(name: str, longest: int) -> str:
    # The end is kept, because names of modules differ there.
    return name if len(name) <= longest else "\N{HORIZONTAL ELLIPSIS}" + name[1 - longest :]
