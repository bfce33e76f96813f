"""Noise and step times from a journal, for the forecast of another run. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from adabatch.batch.step_times import PlanTimes, StepTimeModel, StepTimes
from adabatch.forecast.costs import Evidence, StepCost
from adabatch.report.evaluations import Floats
from adabatch.report.steps import RunSteps
from adabatch.report.summary import noise_band
from adabatch.report.what_if import usable_scale

GROUPS = 8
"""Groups of probes, or of timed steps, whose scatter tells how certain the noise scale, or the price of a step, is."""

T_95 = 1.895
"""One-sided 95 % of Student's t with ``GROUPS - 1`` degrees of freedom."""

WIDEST = 1e3
"""Largest factor of an error bar; at this width next to nothing is known."""

SPREAD = (10, 90)
"""Percentiles of the step times over what the two parts say of their plan, that are used as their spread."""

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
    # In turn, not in eight stretches: a trend over the run would otherwise count as scatter.
    group = np.arange(len(used)) % GROUPS
    noise, signal = (
        np.bincount(group, weights=run.batch[used] * measured[used] / averaged[used])
        for measured, averaged in ((run.measured_noise, run.noise), (run.measured_signal, run.signal))
    )
    without_noise, without_signal = noise.sum() - noise, signal.sum() - signal
    # A group without which no signal is left decides alone whether there is one: next to nothing is known.
    if not ((without_noise > 0).all() and (without_signal > 0).all()):
        return 1 / WIDEST, WIDEST
    return _jackknifed(without_noise / without_signal)


def _jackknifed(without: Floats) -> tuple[float, float]:
    """The factors on an estimate, from the positive estimates without each of the groups."""
    error = math.sqrt((GROUPS - 1) * float(np.var(np.log(without))))
    # the inner cap keeps exp() finite
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


_Plan = tuple[int, int, int]
"""Micro-batch size, accumulation steps and data-parallel size."""


class _Timed(NamedTuple):
    """A step that was timed."""

    plan: _Plan
    seconds: float


class _Split(NamedTuple):
    """The seconds of a step beside its examples and the network, and of an example; the model that they come from."""

    step: float
    example: float
    model: StepTimeModel

    def seconds(self, plan: _Plan) -> float:
        """The time of a step of a plan, with its part of the network."""
        micro_batch_size, accumulation_steps, dp_size = plan
        network = self.model.step(dp_size) - self.model.overhead
        return self.step + self.example * micro_batch_size * accumulation_steps + network


def step_cost_of(run: RunSteps, *, gradient_bytes: float) -> StepCost | None:
    """The cost of a step on one rank, from the timed steps of a run; None if none was timed.

    A batch grows by larger micro-batches while it can, and then by more of them. As long as it grows by larger ones,
    the fixed cost of as many micro-batches as the steps had at least is part of the cost of a step. Once the
    micro-batch is at its limit, the fixed cost is divided among the examples of the largest that ran. With several
    ranks, the network's part is that of the fitted ring (`StepTimeModel`), and is not included: a forecast uses the
    network of its cluster.

    Both parts are scaled so that the time of a timed step is right in the median, and the spread is that of the times
    around them. The band of the price is that of ``_price_band``, or (1, 1) if there are too few timed steps for it.

    Raises:
        ValueError: if the times do not grow with the examples, so that an example would cost nothing.
    """
    timed = _timed_steps(run)
    if not timed:
        return None
    fewest = _fewest_micro_batches(timed)
    split = _split(timed, fewest)
    if split is None:
        raise ValueError(
            f"{run.name}: its steps took no longer with more examples, so that an example would cost nothing; give "
            "--step_seconds and --example_seconds"
        )
    over = [each.seconds / split.seconds(each.plan) for each in timed]
    # A run has steps of odd sizes as well, which have more micro-batches than the two parts know of.
    typical = float(np.median(over))
    low, high = (float(np.percentile(over, at)) / typical for at in SPREAD)
    return StepCost(
        typical * split.step,
        typical * split.example,
        gradient_bytes,
        spread=(low, high),
        price_band=_price_band(timed, fewest) or (1.0, 1.0),
        pivot=_typical_share(timed),
    )


def _timed_steps(run: RunSteps) -> list[_Timed]:
    return [
        _Timed((int(run.micro_batch[at]), int(run.accumulation[at]), int(run.dp_size[at])), float(run.seconds[at]))
        for at in np.flatnonzero(np.isfinite(run.seconds) & (run.seconds > 0)).tolist()
    ]


def _by_plan(timed: Sequence[_Timed]) -> dict[_Plan, list[float]]:
    found = dict[_Plan, list[float]]()
    for plan, seconds in timed:
        found.setdefault(plan, []).append(seconds)
    return found


def _fewest_micro_batches(timed: Sequence[_Timed]) -> int | None:
    """Micro-batches of each step of a run whose batches grow by larger micro-batches; None if they grow by more."""
    micro_sizes, counts = ({each.plan[at] for each in timed} for at in (0, 1))
    if len(micro_sizes) == 1 and len(counts) > 1:
        return None
    # A batch takes the largest micro-batch that makes its size (``PlanGrid.nearest``), and they double. So a step whose
    # micro-batches could be half as many shows that they are at their limit; and one of an odd number does not.
    fewest = min(counts)
    return None if any(count % 2 == 0 and count >= 2 * fewest for count in counts) else fewest


def _typical_share(timed: Sequence[_Timed]) -> float:
    """Examples of a rank in a typical timed step."""
    return float(np.median([each.plan[0] * each.plan[1] for each in timed]))


def _split(timed: Sequence[_Timed], fewest: int | None) -> _Split | None:
    """The time of a step in two parts; None if an example would cost nothing.

    Args:
        timed: the steps.
        fewest: of ``_fewest_micro_batches``, for the whole run.
    """
    of_plan = _by_plan(timed)
    # All times, and not the last few (``StepTimes.after``): a criterion has to forget a machine that has changed.
    model = StepTimes(tuple(PlanTimes(*plan, tuple(taken)) for plan, taken in of_plan.items())).model
    longest = max(float(np.median(taken)) for taken in of_plan.values())
    largest = max(plan[0] * plan[1] for plan in of_plan)
    splits = []
    if fewest is not None:
        splits.append(_Split(model.overhead + fewest * model.micro_batch, model.example, model))
    # Where examples in a larger micro-batch cost nothing, a batch grows for nothing until the micro-batch is at its
    # limit. Steps with equally many micro-batches do not tell their fixed cost from that of the step.
    if len({plan[1] for plan in of_plan}) > 1:
        micro = max(plan[0] for plan in of_plan)
        splits.append(_Split(model.overhead, model.example + model.micro_batch / micro, model))
    # Not "> 0": where the times do not grow, rounding of the fit leaves a cost of 1e-18 of a step, of either sign.
    return next((split for split in splits if split.example * largest > LEAST_SHARE * longest), None)


def _price_band(timed: Sequence[_Timed], fewest: int | None) -> tuple[float, float] | None:
    """Factors on the price of a step, 95 % one-sided in each direction; None with fewer than two steps per group.

    They come from a jackknife over groups of steps, as in ``scatter_band``. If the steps without some group do not tell
    the price, next to nothing is known of it.
    """
    if len(timed) < 2 * GROUPS:
        return None
    rest = [[each for at, each in enumerate(timed) if at % GROUPS != group] for group in range(GROUPS)]
    price = [_price(without, fewest) for without in rest]
    return _jackknifed(np.array(price)) if all(price) else (1 / WIDEST, WIDEST)


def _price(timed: Sequence[_Timed], fewest: int | None) -> float:
    """The price of a step in examples; 0 if the times do not tell it."""
    # A single size says how long a step takes, and nothing about its parts.
    split = _split(timed, fewest) if len({math.prod(each.plan) for each in timed}) > 1 else None
    return split.step / split.example if split is not None else 0.0


def has_price_band(cost: StepCost) -> bool:
    """Whether the price of a step has an error bar."""
    return cost.price_band != (1.0, 1.0)


def timed_sizes(run: RunSteps) -> int:
    """How many different batch sizes were timed. One alone cannot tell the cost of a step from that of its examples."""
    return len(set(run.batch[np.isfinite(run.seconds)].tolist()))


def largest_micro_batch(run: RunSteps) -> int:
    """The largest micro-batch that ran."""
    largest = float(np.nanmax(run.micro_batch))
    return int(largest) if math.isfinite(largest) else 1
