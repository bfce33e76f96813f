"""The schedule that the gradient norms of a recorded run ask for, even if its batch grew.

``lr.refine`` computes a schedule from norms only; ``refine_run`` computes it from a journal (``read_recorded``), with
its batch factors and its progress.

Source: Defazio et al. 2023, arXiv:2310.07831, conversion theorem and Algorithms 1 and 2; the batch factors are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from adabatch.arguments import MOST_STEPS, checked, require
from adabatch.lr.bound import BoundTerms
from adabatch.lr.horizon import Horizon
from adabatch.lr.recorded import GradientNorm, Recorded
from adabatch.lr.refine import (
    POWERS,
    OptimizerKind,
    last_iterate_multipliers,
    median_filter,
    odd_window,
    refined_weights,
)
from adabatch.lr.shapes import FloatArray, Shape, linear, tabulated

READS: Mapping[OptimizerKind, GradientNorm] = MappingProxyType({"sgd": "l2", "adam": "l1", "adagrad": "l1"})
"""Which norm a kind of optimizer reads."""


class RefinedRun(NamedTuple):
    """A refined shape and the data behind it.

    Args:
        shape: a table over progress, with maximum 1 at the steps themselves.
        steps: steps whose norm was measured, shape (num_measured,).
        norms: their norms at the reference batch size, shape (num_measured,).
        smoothed: the same after the median filter.
        window: of that filter, in measured steps.
        progress: of each step, from 0 for the first to 1 for the last, shape (num_steps,).
        values: of the shape at that progress, before it became a table.
        factor: batch factor that the shape assumes, shape (num_steps,).
    """

    shape: Shape
    steps: NDArray[np.int64]
    norms: FloatArray
    smoothed: FloatArray
    window: int
    progress: FloatArray
    values: FloatArray
    factor: FloatArray


@checked
def refine_run(
    recorded: Recorded,
    kind: OptimizerKind = "sgd",
    *,
    factor: FloatArray | None = None,
    edges: FloatArray | None = None,
    smoothing: float = 0.1,
    length: int = 200,
) -> RefinedRun:
    """The shape whose product with the batch factors is the refined schedule of the steps that were taken.

    With the norms ``G_t`` at the batch sizes of the run, the schedule is ``w_t * sum_{p>t} w_p``, where ``w = G^-2``
    (sgd) or ``G^-1``. A growing batch makes the norms smaller and the weights larger: the weights already contain a
    scaling of the learning rate, for sgd in expectation AdaScale's gain. The batch factor ``f_t`` of the next run is
    therefore taken out of the first weight, which then uses the norm at the reference batch size (exactly that, in
    expectation, for the rule "gain"). It stays in the sum, which is over the steps that will be taken:

        shape_t = w_t / f_t * sum_{p>t} w_p

    For a constant batch this is ``lr.refine``. Steps between two measured ones are interpolated.

    Args:
        recorded: the run.
        kind: of optimizer, as for ``lr.refine``.
        factor: ``f_t``, shape (num_steps,); by default those of the run. ``recorded.factors(rule, reference)`` for
            another rule.
        edges: what was consumed before each step and after the last, shape (num_steps + 1,); by default examples.
        smoothing: window of the median filter as a share of the measured norms, in [0, 1].
        length: largest number of entries of the table, at least 2.

    Raises:
        ValueError: if numbers are out of their range, or the norms cannot be used.
    """
    require(0 <= smoothing <= 1, "smoothing must lie in [0, 1], a share of the norms", smoothing)
    require(length >= 2, "length must be at least 2, for the first and the last value", length)
    factor = recorded.factor if factor is None else factor
    edges = recorded.edges("examples", 1.0) if edges is None else edges
    require(length <= MOST_STEPS, f"length must be at most {MOST_STEPS}", length)
    _check_arrays(recorded, factor, edges)
    measured = recorded.norms(READS[kind])
    # at the reference batch size, where norms do not jump with the batch, and so can be smoothed
    norms = measured.norms * factor[measured.at] ** (1 / POWERS[kind])
    window = odd_window(smoothing, norms.size)
    smoothed = median_filter(norms, window)
    # interpolated only after the filter, whose window counts measured norms
    weights = refined_weights(measured._replace(norms=smoothed).for_each(recorded.num_steps), kind)
    values = weights * last_iterate_multipliers(weights * factor)
    values /= values.max()
    # The last step is at progress 1, as the last entry of a table is.
    progress = edges[:-1] / edges[-2]
    equal = np.allclose(np.diff(progress), 1 / (recorded.num_steps - 1), rtol=1e-9, atol=0)
    # A table has equal distances of progress. Only then do its entries fall on the steps, and hold their values as they
    # are.
    exact = equal and recorded.num_steps <= length
    table = values if exact else np.interp(np.linspace(0, 1, length), progress, values)
    # six digits are enough, and the pictures then show exactly what the config file contains
    return RefinedRun(
        tabulated(values=[float(f"{value:.6g}") for value in table.tolist()]),
        measured.at,
        norms,
        smoothed,
        window,
        progress,
        values,
        factor,
    )


@checked
def refined_bounds(recorded: Recorded, made: RefinedRun, edges: FloatArray | None = None) -> dict[str, BoundTerms]:
    """The last-iterate bound of a run's own schedule, of the refined one and of linear decay, at the run's l2 norms.

    Args:
        recorded: the run.
        made: what ``refine_run`` made of it.
        edges: as for ``refine_run``.

    Returns:
        Terms by "the run's own", "refined" and "linear"; empty if the journal has no l2 norms or no schedule.
    """
    edges = recorded.edges("examples", 1.0) if edges is None else edges
    _check_arrays(recorded, made.factor, edges)
    if np.isnan(recorded.l2).all() or np.isnan(recorded.shape).any() or not recorded.shape.any():
        return {}
    horizon = Horizon(edges, made.factor, recorded.norms("l2").for_each(recorded.num_steps))
    return {
        "the run's own": horizon.terms(recorded.shape * recorded.factor),
        "refined": horizon.terms(horizon.factors(made.shape)),
        # the best shape for constant norms: what reading the norms is worth shows beside it
        "linear": horizon.terms(horizon.factors(linear())),
    }


def _check_arrays(recorded: Recorded, factor: FloatArray, edges: FloatArray) -> None:
    steps = recorded.num_steps
    fits = factor.shape == (steps,) and bool(np.all(np.isfinite(factor) & (factor > 0)))
    require(fits, f"factor must be {steps} positive numbers, one per step", factor)
    fits = edges.shape == (steps + 1,) and bool(np.all(np.isfinite(edges))) and bool(np.all(np.diff(edges) > 0))
    require(fits, f"edges must be {steps + 1} finite numbers that ascend, one per step and the end", edges)
