"""What a run costs on a cluster, in the batches that take the least time there. Pure.

A step of b examples on p devices takes ``s + r(p) + e b / p`` seconds: what a step costs on a device whatever its batch
is, an all-reduce, and its share of the examples. To make the progress P (in examples of small batches) at the noise
scale B takes ``P (1 / b + 1 / B)`` steps (McCandlish et al. 2018, section 2), so the batch of the least time is
``sqrt(B price)``, where the price ``p (s + r(p)) / e`` is what a step costs in examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from adabatch.arguments import checked, require
from adabatch.forecast.network import Cluster, all_reduce_seconds

Floats = NDArray[np.float64]

LEAST_STEPS = 200
"""Steps that a run has at least: below, a learning rate has no time to warm up and to fall, whatever the noise says."""

LEAST_EFFICIENCY = 0.25
"""Worth of an example that a plan does not fall below: at three noise scales."""

ASSUMPTIONS = (
    "The noise scale depends on the progress made, and not on the batch by which it was made.",
    "Each batch has the learning rate that is right for it.",
    "A step makes 1 / (1 + B / b) of the progress of one without noise (McCandlish et al. 2018, section 2).",
    "The batch follows the noise at once and unrounded, within its limits, with at least one example per device.",
    "The all-reduce is the fastest of ring, tree and hierarchy without contention or jitter, which make small messages "
    "take twice as long and more; and nothing of it is hidden behind the backward.",
    "Data-parallel training only: each device holds the whole model, and sends all of its gradient in each step.",
    "Evaluation, checkpoints, data loading and failures are not in the time.",
    "How far off such a plan is has not been measured yet: the ranges hold the errors of noise and times only.",
)


class Range(NamedTuple):
    """A number with the least and the most that the measured spreads allow."""

    low: float
    point: float
    high: float

    @classmethod
    def around(cls, point: float, values: Sequence[float]) -> Range:
        """The range that holds the point and all values."""
        return cls(min(point, *values), point, max(point, *values))


class Evidence(NamedTuple):
    """What is known of the noise.

    Args:
        examples: that were consumed in each segment of the run, shape (num_segments,).
        batch: examples per step in it, of the same shape.
        noise_scale: in it, in examples, positive and finite, of the same shape.
        band: factors on the noise scale, at most and at least 1: its error bar.
    """

    examples: Floats
    batch: Floats
    noise_scale: Floats
    band: tuple[float, float] = (1.0, 1.0)

    def progress(self, factor: float = 1.0) -> Floats:
        """In examples of small batches, if the noise scale is ``factor`` times what was measured."""
        moved: Floats = self.examples / (1 + self.batch / (factor * self.noise_scale))
        return moved


class StepCost(NamedTuple):
    """What a step costs on one device.

    Args:
        step: seconds beside its examples and the network, zero or positive.
        example: seconds per example, positive.
        gradient_bytes: that are summed over the devices in each step.
        spread: factors on both times, at most and at least 1.
    """

    step: float
    example: float
    gradient_bytes: float
    spread: tuple[float, float] = (1.0, 1.0)


class Forecast(NamedTuple):
    """What the run costs on a cluster.

    Args:
        devices: of the cluster.
        price: of a step, in examples over all devices: the number of ``StepPrice``.
        batch: examples per step, the mean over the steps.
        smallest_batch: of the run.
        largest_batch: of the run, at the upper end of the noise scale's band.
        examples: to the same progress.
        steps: optimizer steps.
        efficiency: worth of an example over one in a small batch.
        hours: of the whole run.
        device_hours: hours times devices.
        money: device-hours times the price of one.
        sent_bytes: by all devices together.
        all_reduce: seconds of one.
    """

    devices: int
    price: float
    batch: Range
    smallest_batch: float
    largest_batch: float
    examples: Range
    steps: Range
    efficiency: Range
    hours: Range
    device_hours: Range
    money: Range
    sent_bytes: Range
    all_reduce: float


class _Totals(NamedTuple):
    steps: float
    examples: float
    efficiency: float
    seconds: float
    smallest: float
    largest: float


@checked
def forecast(
    evidence: Evidence,
    cost: StepCost,
    cluster: Cluster,
    *,
    limits: tuple[float | None, float | None] = (None, None),
    batch: float | None = None,
) -> Forecast:
    """What the run costs, in the batches of the least time or in a constant one.

    Args:
        evidence: the noise.
        cost: the time of a step on one device.
        cluster: devices and network.
        limits: smallest and largest batch, in examples; None for none.
        batch: a constant one, in examples, instead of the best.

    Returns:
        The point is for the numbers as measured; the range spans both ends of the noise scale's band with both ends of
        the times' spread.

    Raises:
        ValueError: noise scales, times or a batch that are not positive and finite, or limits that cross.
    """
    _check(evidence, cost, limits, batch)
    reduce = all_reduce_seconds(cluster, cost.gradient_bytes)
    price = cluster.devices * (cost.step + reduce) / cost.example

    def totals(noise: float, time: float) -> _Totals:
        scale = evidence.noise_scale * noise
        # The price is chosen once, before the run: a spread of the times changes what it costs, not what is done.
        taken = np.sqrt(scale * price) if batch is None else np.full(len(scale), batch)
        # A device has one example at least, whatever the limits say.
        taken = np.maximum(np.clip(taken, limits[0], math.inf if limits[1] is None else limits[1]), cluster.devices)
        progress = evidence.progress(noise)
        steps = progress * (1 / taken + 1 / scale)
        used = steps * taken
        seconds = steps * (time * (cost.step + cost.example * taken / cluster.devices) + reduce)
        return _Totals(
            float(steps.sum()),
            float(used.sum()),
            float(progress.sum() / used.sum()),
            float(seconds.sum()),
            float(taken.min()),
            float(taken.max()),
        )

    point = totals(1.0, 1.0)
    ends = [totals(noise, time) for noise in evidence.band for time in cost.spread]
    hours = Range.around(point.seconds / 3600, [each.seconds / 3600 for each in ends])
    steps = Range.around(point.steps, [each.steps for each in ends])
    device_hours = _times(hours, cluster.devices)
    return Forecast(
        devices=cluster.devices,
        price=price,
        batch=Range.around(point.examples / point.steps, [each.examples / each.steps for each in ends]),
        smallest_batch=min(each.smallest for each in (point, *ends)),
        largest_batch=max(each.largest for each in (point, *ends)),
        examples=Range.around(point.examples, [each.examples for each in ends]),
        steps=steps,
        efficiency=Range.around(point.efficiency, [each.efficiency for each in ends]),
        hours=hours,
        device_hours=device_hours,
        money=_times(device_hours, cluster.price_per_hour),
        # The least that any all-reduce sends, and what rings and hierarchies send: 2 (p - 1) / p of the gradient each.
        sent_bytes=_times(steps, 2 * (cluster.devices - 1) * cost.gradient_bytes),
        all_reduce=reduce,
    )


def largest_sensible(evidence: Evidence) -> float:
    """The batch beyond which a plan does not go by itself, in examples.

    ``1 / LEAST_EFFICIENCY - 1`` noise scales, of the largest in the run; and less where the progress of the run would
    take fewer than ``LEAST_STEPS`` steps. The rule of the least time knows neither: with steps that are dear it asks
    for batches far beyond the noise scale, in which the model behind it was never checked.
    """
    by_noise = (1 / LEAST_EFFICIENCY - 1) * float(evidence.noise_scale.max())
    by_length = float(evidence.progress().sum()) / LEAST_STEPS
    return max(1.0, min(by_noise, by_length))


@checked
def knee(
    evidence: Evidence,
    cost: StepCost,
    cluster: Cluster,
    *,
    limits: tuple[float | None, float | None] = (None, None),
    most: int = 2**20,
) -> int:
    """The largest power of two of devices whose device-hours are at most twice those of a single one.

    Up to there twice the devices still shorten the run; beyond, most of what they add is lost to waiting and to noise.
    """

    require(most >= 1, "most must be at least 1 device", most)

    def device_hours(devices: int) -> float:
        return forecast(evidence, cost, replace(cluster, devices=devices), limits=limits).device_hours.point

    alone, found = device_hours(1), 1
    while 2 * found <= most:
        if device_hours(2 * found) > 2 * alone:
            break
        found *= 2
    return found


def extended(evidence: Evidence, examples: float) -> Evidence:
    """The evidence for a run of ``examples``: cut, or with the noise scale and batch of its last quarter for the rest.

    The error of the rest is that of a quarter of the probes, twice that of all (in logarithms), and is taken for the
    whole of a longer run.

    Raises:
        ValueError: a number of examples that is not positive.
    """
    if not 0 < examples < math.inf:
        raise ValueError(f"examples must be positive and finite, got {examples}")
    ends = np.cumsum(evidence.examples)
    before = ends - evidence.examples
    kept = before < examples
    cut = evidence._replace(
        examples=np.minimum(evidence.examples, examples - before)[kept],
        batch=evidence.batch[kept],
        noise_scale=evidence.noise_scale[kept],
    )
    left = examples - float(ends[-1])
    if left <= 0:
        return cut
    last = ends > 0.75 * ends[-1]
    taken, batch, scale = evidence.examples[last], evidence.batch[last], evidence.noise_scale[last]
    low, high = evidence.band
    return Evidence(
        np.append(cut.examples, left),
        np.append(cut.batch, taken.sum() / (taken / batch).sum()),
        np.append(cut.noise_scale, np.exp(np.average(np.log(scale), weights=taken))),
        (low**2, high**2),
    )


def _times(range_: Range, factor: float) -> Range:
    return Range(*(value * factor for value in range_))


def _check(evidence: Evidence, cost: StepCost, limits: tuple[float | None, float | None], batch: float | None) -> None:
    scale = evidence.noise_scale
    if not (scale.size and np.isfinite(scale).all() and (scale > 0).all()):
        raise ValueError("noise scales must be positive and finite, one at least")
    if not 0 < cost.example < math.inf or not 0 <= cost.step < math.inf or not 0 <= cost.gradient_bytes < math.inf:
        raise ValueError(f"an example must take a positive time, a step and its bytes zero or more, got {cost}")
    for name, (low, high) in (("band", evidence.band), ("spread", cost.spread)):
        if not 0 < low <= 1 <= high < math.inf:
            raise ValueError(f"the {name} must be factors around 1, got {low} and {high}")
    low_limit, high_limit = limits
    if low_limit is not None and high_limit is not None and low_limit > high_limit:
        raise ValueError(f"the smallest batch, {low_limit:g}, must not exceed the largest, {high_limit:g}")
    if batch is not None and not 0 < batch < math.inf:
        raise ValueError(f"a constant batch must be positive and finite, got {batch}")
