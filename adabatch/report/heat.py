"""The noise scale of each layer over the run, in the cells of a heat map. Pure: numpy only."""

from __future__ import annotations

from typing import Any

import numpy as np

from adabatch.report.steps import RunSteps

MOST_COLUMNS = 80
FEWEST_ROWS = 8


def layer_bins(run: RunSteps, cells: int) -> dict[str, Any]:
    """The noise scale per layer and stretch of the run: mean noise over mean signal of the steps in it.

    Args:
        run: a run with layers.
        cells: largest number of cells over all layers; layers with the least noise are left out.

    Returns:
        "names" of the layers, those with the most noise first; their "shares" of the noise; "edges" of the columns as
        numbers of steps, one more than there are columns; "values", shape (num_layers, num_columns), NaN without a
        measurement and -1 without signal; and "left_out", the number of other layers.
    """
    columns = min(MOST_COLUMNS, run.num_steps)
    edges = np.unique(np.linspace(0, run.num_steps, columns + 1).astype(int))
    known = np.isfinite(run.layer_noise) & np.isfinite(run.layer_signal)
    # sums of noise and signal apart, divided last: a mean of quotients would follow its outliers
    noise = np.add.reduceat(np.where(known, run.layer_noise, 0.0), edges[:-1])
    signal = np.add.reduceat(np.where(known, run.layer_signal, 0.0), edges[:-1])
    some = np.add.reduceat(known.astype(float), edges[:-1]) > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        # unbiased estimates, whose sum may be negative by chance
        scale = np.where(signal > 0, np.maximum(noise, 0.0) / signal, np.inf)
    total = np.maximum(noise.sum(axis=0), 0.0)
    rows = max(FEWEST_ROWS, cells // (len(edges) - 1))
    order = np.argsort(-total, kind="stable")[:rows]
    whole = total.sum()
    return {
        "names": [run.layers[index] for index in order],
        "shares": total[order] / whole if whole > 0 else np.zeros(len(order)),
        "edges": edges,
        # JSON has no infinity: no signal is -1
        "values": np.where(some, np.where(np.isinf(scale), -1.0, scale), np.nan)[:, order].T,
        "left_out": len(run.layers) - len(order),
    }
