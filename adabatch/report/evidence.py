"""What a journal says of the noise and of the time of a step, for a forecast of another run. Pure."""

from __future__ import annotations

import math

import numpy as np

from adabatch.batch.plan import BatchPlan
from adabatch.batch.step_times import StepTimes
from adabatch.forecast.costs import Evidence, StepCost
from adabatch.report.steps import RunSteps
from adabatch.report.summary import noise_band
from adabatch.report.what_if import usable_scale

SPREAD = (10, 90)
"""Percentiles of the step times, over the median of their plan, that count as their spread."""


def evidence_of(run: RunSteps) -> Evidence:
    """The noise of a run, step by step; updates that were left out made no progress, and are left out here too.

    Its band is the median over the steps of the journal's bounds over the estimate; 1 and 1 where it has none.

    Raises:
        ValueError: there is no noise scale in the journal, or no update was applied.
    """
    scale, applied = usable_scale(run), run.applied
    if not applied.any():
        raise ValueError(f"{run.name}: no update was applied, so that there is no progress to plan from")
    factors, bounds = (1.0, 1.0), noise_band(run)
    if bounds is not None:
        known = np.isfinite(bounds[0]) & np.isfinite(bounds[1]) & (bounds[0] > 0) & np.isfinite(run.noise_scale)
        if known.any():
            low, high = (float(np.median(bound[known] / scale[known])) for bound in bounds)
            factors = min(low, 1.0), max(high, 1.0)
    return Evidence(run.batch[applied], run.batch[applied], scale[applied], factors)


def has_band(evidence: Evidence) -> bool:
    """Whether the noise scale has an error bar."""
    return evidence.band != (1.0, 1.0)


def step_cost_of(run: RunSteps, *, gradient_bytes: float) -> StepCost | None:
    """What a step cost on one rank, from its timed steps; None where none was timed.

    A micro-batch's own cost is shared out over the largest that was run; where all timed steps had as many of them, it
    counts as the step's. With several ranks the network's part is that
    of the fitted ring (`StepTimeModel`), and is left out here: a forecast puts the cluster's own in its place.

    Raises:
        ValueError: the times do not grow with the examples, so that an example would cost nothing.
    """
    timed = np.flatnonzero(np.isfinite(run.seconds) & (run.seconds > 0))
    if not timed.size:
        return None
    times, of_plan = StepTimes(), dict[tuple[int, int, int], list[float]]()
    for index in timed.tolist():
        key = int(run.micro_batch[index]), int(run.accumulation[index]), int(run.dp_size[index])
        made = BatchPlan(micro_batch_size=key[0], accumulation_steps=key[1], dp_size=key[2])
        times = times.after(made, float(run.seconds[index]))
        of_plan.setdefault(key, []).append(float(run.seconds[index]))
    model = times.model
    micro = max(key[0] for key in of_plan)
    step, example = model.overhead, model.example + model.micro_batch / micro
    if len({key[1] for key in of_plan}) == 1:
        # Steps of one number of micro-batches do not tell what one costs from what a step costs: it is all the step's.
        step, example = step + next(iter(of_plan))[1] * model.micro_batch, model.example
    if not example > 0:
        raise ValueError(
            f"{run.name}: its steps took no longer with more examples, so that an example would cost nothing; give "
            "--step_seconds and --example_seconds"
        )
    over = np.concatenate([np.array(taken) / np.median(taken) for taken in of_plan.values()])
    low, high = (float(np.percentile(over, at)) for at in SPREAD)
    return StepCost(step, example, gradient_bytes, (min(low, 1.0), max(high, 1.0)))


def timed_sizes(run: RunSteps) -> int:
    """How many different batch sizes were timed: one alone cannot tell a step from its examples."""
    return len(set(run.batch[np.isfinite(run.seconds)].tolist()))


def largest_micro_batch(run: RunSteps) -> int:
    """The largest micro-batch that ran."""
    largest = float(np.nanmax(run.micro_batch))
    return int(largest) if math.isfinite(largest) else 1
