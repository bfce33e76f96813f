"""Noise and step times from a journal, for the forecast of another run. Pure."""

from __future__ import annotations

import math

import numpy as np

from adabatch.batch.step_times import PlanTimes, StepTimes
from adabatch.forecast.costs import Evidence, StepCost
from adabatch.report.evaluations import Floats
from adabatch.report.steps import RunSteps
from adabatch.report.summary import noise_band
from adabatch.report.what_if import usable_scale

GROUPS = 8
"""Groups of probes, whose scatter tells how certain the noise scale of a run is."""

T_95 = 1.895
"""One-sided 95 % of Student's t with ``GROUPS - 1`` degrees of freedom."""

WIDEST = 1e3
"""Largest factor of an error bar; at this width next to nothing is known."""

SPREAD = (10, 90)
"""Percentiles of the step times, relative to the median of their plan, that are used as their spread."""

LEAST_SHARE = 1e-6
"""Share of the longest step that its examples must have taken, for their cost to be known."""


def evidence_of(run: RunSteps) -> Evidence:
    """The noise of a run, step by step, without the updates that were left out, which made no progress.

    The band comes from the scatter of the probes (``scatter_band``). If there are too few, it is the median over the
    steps of the journal's bounds relative to the estimate, or (1, 1) if the journal has no bounds.

    Raises:
        ValueError: if there is no noise scale in the journal, or no update was applied.
    """
    scale, applied = usable_scale(run), run.applied
    if not applied.any():
        raise ValueError(f"{run.name}: no update was applied, so that there is no progress to plan from")
    band = scatter_band(run) or _band_of_bounds(run, scale) or (1.0, 1.0)
    return Evidence(run.batch[applied], run.batch[applied], scale[applied], band)


def scatter_band(run: RunSteps) -> tuple[float, float] | None:
    """Factors on the noise scale of the whole run, 95 % one-sided in each direction, from the scatter of its probes.

    Each probe is divided by the averages at its step, so that a rising noise scale does not count as scatter, and is
    weighted by the examples of its step. The probes are assigned to eight groups in turn, each of which covers the
    whole run. The error of the logarithm of summed noise over summed signal is then that of a jackknife over the
    groups. No criterion is needed, so this also works for a run that only records its noise.

    Returns:
        The two factors; None if there are fewer than two probes per group.

    Source: Tukey 1958, "Bias and confidence in not-quite large samples", for the jackknife; here it is over groups.
    """
    used = np.flatnonzero(
        np.isfinite(run.measured_noise) & np.isfinite(run.measured_signal) & (run.noise > 0) & (run.signal > 0)
    )
    if len(used) < 2 * GROUPS:
        return None
    group = np.arange(len(used)) % GROUPS
    noise, signal = (
        np.bincount(group, weights=run.batch[used] * measured[used] / averaged[used])
        for measured, averaged in ((run.measured_noise, run.noise), (run.measured_signal, run.signal))
    )
    without_noise, without_signal = noise.sum() - noise, signal.sum() - signal
    if not ((without_noise > 0).all() and (without_signal > 0).all()):
        return 1 / WIDEST, WIDEST
    log_scale = np.log(without_noise / without_signal)
    error = math.sqrt((GROUPS - 1) * float(np.var(log_scale)))
    factor = min(math.exp(min(T_95 * error, 50.0)), WIDEST)
    return 1 / factor, factor


def _band_of_bounds(run: RunSteps, scale: Floats) -> tuple[float, float] | None:
    bounds = noise_band(run)
    if bounds is None:
        return None
    known = np.isfinite(bounds[0]) & np.isfinite(bounds[1]) & (bounds[0] > 0) & np.isfinite(run.noise_scale)
    if not known.any():
        return None
    low, high = (float(np.median(bound[known] / scale[known])) for bound in bounds)
    return min(low, 1.0), max(high, 1.0)


def has_band(evidence: Evidence) -> bool:
    """Whether the noise scale has an error bar."""
    return evidence.band != (1.0, 1.0)


def step_cost_of(run: RunSteps, *, gradient_bytes: float) -> StepCost | None:
    """The cost of a step on one rank, from the timed steps of a run; None if none was timed.

    The fixed cost of a micro-batch is divided among the examples of the largest that ran; if all timed steps had
    equally many micro-batches, it is added to the cost of the step. With several ranks, the network's part is that of
    the fitted ring (`StepTimeModel`), and is not included: a forecast uses the network of its cluster.

    Raises:
        ValueError: if the times do not grow with the examples, so that an example would cost nothing.
    """
    timed = np.flatnonzero(np.isfinite(run.seconds) & (run.seconds > 0))
    if not timed.size:
        return None
    of_plan = dict[tuple[int, int, int], list[float]]()
    for index in timed.tolist():
        key = int(run.micro_batch[index]), int(run.accumulation[index]), int(run.dp_size[index])
        of_plan.setdefault(key, []).append(float(run.seconds[index]))
    # All times, and not the last few (``StepTimes.after``): a criterion has to forget a machine that has changed.
    model = StepTimes(tuple(PlanTimes(*key, tuple(taken)) for key, taken in of_plan.items())).model
    micro = max(key[0] for key in of_plan)
    step, example = model.overhead, model.example + model.micro_batch / micro
    if len({key[1] for key in of_plan}) == 1:
        # If all steps have equally many micro-batches, their fixed cost cannot be told from that of the step.
        step, example = step + next(iter(of_plan))[1] * model.micro_batch, model.example
    longest = max(float(np.median(taken)) for taken in of_plan.values())
    # Not "> 0": where the times do not grow, rounding of the fit leaves a cost of 1e-18 of a step, of either sign.
    if not example * max(key[0] * key[1] for key in of_plan) > LEAST_SHARE * longest:
        raise ValueError(
            f"{run.name}: its steps took no longer with more examples, so that an example would cost nothing; give "
            "--step_seconds and --example_seconds"
        )
    over = np.concatenate([np.array(taken) / np.median(taken) for taken in of_plan.values()])
    low, high = (float(np.percentile(over, at)) for at in SPREAD)
    return StepCost(step, example, gradient_bytes, (min(low, 1.0), max(high, 1.0)))


def timed_sizes(run: RunSteps) -> int:
    """How many different batch sizes were timed. One alone cannot tell the cost of a step from that of its examples."""
    return len(set(run.batch[np.isfinite(run.seconds)].tolist()))


def largest_micro_batch(run: RunSteps) -> int:
    """The largest micro-batch that ran."""
    largest = float(np.nanmax(run.micro_batch))
    return int(largest) if math.isfinite(largest) else 1
