"""The cost of a run on a cluster, with the batches that take the least time there. Pure.

A step of b examples on p devices takes ``s + r(p) + e b / p`` seconds: a fixed time per device, an all-reduce, and the
device's share of the examples. The progress P (in examples of small batches) at the noise scale B takes
``P (1 / b + 1 / B)`` steps (McCandlish et al. 2018, section 2). So the batch with the least time is ``sqrt(B price)``,
where the price ``p (s + r(p)) / e`` is the fixed cost of a step in examples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from adabatch.arguments import checked, require
from adabatch.forecast.network import Cluster, all_reduce_seconds

Floats = NDArray[np.float64]

LEAST_STEPS = 200
"""Least number of steps of a run. With fewer, the learning rate has no time to warm up and to fall, whatever the
noise."""

LEAST_EFFICIENCY = 0.25
"""Least worth of an example in a plan; it is reached at three noise scales."""

RISE = 0.462
"""Exponent of the examples with which the noise scale is taken to rise beyond what was measured: that of the critical
batch in the tokens of a run (Bergsma et al. 2025, figure 1). The range of a plan goes from no rise to twice that."""

SEGMENTS = 16
"""Segments of a rising noise scale."""

ASSUMPTIONS = (
    "The noise scale depends on the progress made, and not on the batch by which it was made.",
    "Each batch has the learning rate that is right for it.",
    "A step makes 1 / (1 + B / b) of the progress of one without noise (McCandlish et al. 2018, section 2).",
    "The batch follows the noise at once and unrounded, within its limits, with at least one example per device.",
    "The all-reduce is the fastest of ring, tree and hierarchy without contention or jitter, which make small messages "
    "take twice as long and more; and nothing of it is hidden behind the backward.",
    "Data-parallel training only: each device holds the whole model, and sends all of its gradient in each step.",
    "Evaluation, checkpoints, data loading and failures are not in the time.",
    "The ranges hold the errors of the noise scale, of the price of a step and of times only, as independent errors. "
    "Plans from the first fifth of a run, of small networks on one process, were off by a factor of 1.3 in steps and "
    "the mean batch and 1.2 in time, in the median; 21 of 24 ranges held what came out "
    "(benchmarks/results/plan_accuracy.md).",
)


class Range(NamedTuple):
    """A number, with the lowest and highest values that the measured spreads allow."""

    low: float
    point: float
    high: float

    @classmethod
    def of_errors(cls, point: float, alone: Sequence[Sequence[float]], together: Sequence[float]) -> Range:
        """The range of a number under several independent errors.

        Their logarithms add like those of independent errors: the root of the sum of squares, up and down apart. The
        range goes no further than errors do alone or together.

        Args:
            point: the number without errors, positive.
            alone: the number at both ends of each error, without the others.
            together: the number at all ends of all errors.
        """
        up, down = (
            math.hypot(*(max(0.0, *(sign * math.log(value / point) for value in ends)) for ends in alone))
            for sign in (1, -1)
        )
        seen = [point, *together, *(value for ends in alone for value in ends)]
        return cls(max(point * math.exp(-down), min(seen)), point, min(point * math.exp(up), max(seen)))


class Evidence(NamedTuple):
    """The measured noise of a run in segments.

    Args:
        examples: examples consumed in each segment, shape (num_segments,).
        batch: examples per step in it, same shape.
        noise_scale: noise scale in it, in examples, positive and finite, same shape.
        band: the error bar of the noise scale, as two factors, one at most 1 and one at least 1.
    """

    examples: Floats
    batch: Floats
    noise_scale: Floats
    band: tuple[float, float] = (1.0, 1.0)

    def progress(self, factor: float = 1.0) -> Floats:
        """Progress in examples of small batches, if the noise scale is ``factor`` times the measured one."""
        progress: Floats = self.examples / (1 + self.batch / (factor * self.noise_scale))
        return progress


class StepCost(NamedTuple):
    """The cost of a step on one device.

    Args:
        step: seconds per step without its examples and the network, zero or positive.
        example: seconds per example, positive.
        gradient_bytes: bytes that are summed over the devices in each step.
        spread: the spread of step times around both, as two factors, one at most 1 and one at least 1.
        price_band: the error bar of ``step / example``, as two factors, one at most 1 and one at least 1.
        pivot: examples per device of a typical timed step, positive. The time of such a step is known much better than
            how it divides into a fixed part and its examples.
    """

    step: float
    example: float
    gradient_bytes: float
    spread: tuple[float, float] = (1.0, 1.0)
    price_band: tuple[float, float] = (1.0, 1.0)
    pivot: float = 1.0

    def repriced(self, factor: float) -> StepCost:
        """With ``step / example`` multiplied by ``factor``, and the time of ``pivot`` examples as before."""
        price = factor * self.step / self.example
        example = (self.step + self.example * self.pivot) / (price + self.pivot)
        return self._replace(step=price * example, example=example)


class Forecast(NamedTuple):
    """The cost of a run on a cluster.

    Args:
        devices: devices of the cluster.
        price: price of a step, in examples over all devices, as in ``StepPrice``.
        batch: examples per step, the mean over the steps.
        smallest_batch: the smallest batch of the run at this price, at the lower end of the noise scale's band.
        largest_batch: the largest batch of the run at this price, at the upper end of the noise scale's band.
        examples: examples to the same progress.
        steps: optimizer steps.
        efficiency: worth of an example relative to one in a small batch.
        hours: hours of the whole run.
        device_hours: hours times devices.
        money: device-hours times their price.
        sent_bytes: bytes that all devices send together.
        all_reduce: seconds of one all-reduce.
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
    examples: float | None = None,
) -> Forecast:
    """The cost of a run, with the batches of the least time or with a constant batch.

    Args:
        evidence: the noise.
        cost: the time of a step on one device.
        cluster: devices and network.
        limits: smallest and largest batch, in examples; None for no limit.
        batch: a constant batch, in examples, instead of the best ones.
        examples: what the run takes, whatever the errors; None for the progress of the evidence, which takes as many as
            the batches need.

    Returns:
        Ranges whose point is for the numbers as measured. They hold the noise scale's band, the times' spread and the
        price's band, as independent errors. The batches of the least time follow the noise scale and the price.

    Raises:
        ValueError: if noise scales, times or the batch are not positive and finite, or the limits cross.
    """
    _check(evidence, cost, limits, batch)
    require(examples is None or 0 < examples < math.inf, "examples must be positive and finite", examples)
    reduce = all_reduce_seconds(cluster, cost.gradient_bytes)

    def totals(noise: float, time: float = 1.0, factor: float = 1.0) -> _Totals:
        scale, split = evidence.noise_scale * noise, cost.repriced(factor)
        # The spread is that of single steps around the same price: it changes the cost of a run, not its batches.
        price = cluster.devices * (split.step + reduce) / split.example
        taken = np.sqrt(scale * price) if batch is None else np.full(len(scale), batch)
        # Each device has at least one example, whatever the limits.
        taken = np.maximum(np.clip(taken, limits[0], math.inf if limits[1] is None else limits[1]), cluster.devices)
        # with the same factor: if the noise scale is larger than measured, the run has made more progress with its
        # examples
        progress = evidence.progress(noise)
        # over the progress of a step of b examples, b / (1 + b / B)
        steps = progress * (1 / taken + 1 / scale)
        used = steps * taken
        if examples is not None:
            share = examples / used.sum()
            progress, steps, used = share * progress, share * steps, share * used
        # the spread is that of a device's own times; those of the network are taken as the model gives them
        seconds = steps * (time * (split.step + split.example * taken / cluster.devices) + reduce)
        return _Totals(
            float(steps.sum()),
            float(used.sum()),
            float(progress.sum() / used.sum()),
            float(seconds.sum()),
            float(taken.min()),
            float(taken.max()),
        )

    point = totals(1.0)
    of_noise = [totals(noise) for noise in evidence.band]
    alone = [
        of_noise,
        [totals(1.0, time=time) for time in cost.spread],
        [totals(1.0, factor=factor) for factor in cost.price_band],
    ]
    # Which end is the worse one depends on the number, so all eight corners are computed.
    together = [totals(*each) for each in itertools.product(evidence.band, cost.spread, cost.price_band)]

    def ranged(of: Callable[[_Totals], float]) -> Range:
        return Range.of_errors(of(point), [[of(end) for end in ends] for ends in alone], [of(end) for end in together])

    hours = ranged(lambda found: found.seconds / 3600)
    steps = ranged(lambda found: found.steps)
    device_hours = _times(hours, cluster.devices)
    return Forecast(
        devices=cluster.devices,
        price=cluster.devices * (cost.step + reduce) / cost.example,
        batch=ranged(lambda found: found.examples / found.steps),
        smallest_batch=min(found.smallest for found in (point, *of_noise)),
        largest_batch=max(found.largest for found in (point, *of_noise)),
        examples=ranged(lambda found: found.examples),
        steps=steps,
        efficiency=ranged(lambda found: found.efficiency),
        hours=hours,
        device_hours=device_hours,
        money=_times(device_hours, cluster.price_per_hour),
        # Each device sends 2 (p - 1) / p of the gradient: the minimum for any all-reduce, and exact for rings and
        # hierarchies.
        sent_bytes=_times(steps, 2 * (cluster.devices - 1) * cost.gradient_bytes),
        all_reduce=reduce,
    )


def largest_sensible(evidence: Evidence) -> float:
    """The largest batch of a plan without limits, in examples.

    This is ``1 / LEAST_EFFICIENCY - 1`` times the largest noise scale of the run, or less if the progress of the run
    would otherwise take fewer than ``LEAST_STEPS`` steps. The rule of the least time alone has no such limits: if steps
    are expensive, it asks for batches far beyond the noise scale, for which the model behind it was never checked.
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
    """The largest power of two of devices whose device-hours are at most twice those of a single device.

    Up to this number, more devices still shorten the run considerably; beyond it, most of what they add is lost to
    waiting and to noise.
    """

    require(most >= 1, "most must be at least 1 device", most)

    def device_hours(devices: int) -> float:
        return forecast(evidence, cost, replace(cluster, devices=devices), limits=limits).device_hours.point

    alone, found = device_hours(1), 1
    while 2 * found <= most:
        # Device-hours rise with the devices, so the first number that fails ends the search.
        if device_hours(2 * found) > 2 * alone:
            break
        found *= 2
    return found


def extended(evidence: Evidence, examples: float) -> Evidence:
    """The evidence for a run of ``examples``: cut, or extended from the noise scale and batch of its last quarter.

    Beyond the end the noise scale continues as ``examples ** RISE``. The band then also holds a noise scale that stays
    as it was, and one with twice the exponent. The extension has the error of a quarter of the probes, which is twice
    that of all (in logarithms). This error is used for the whole of a longer run.

    Raises:
        ValueError: if the number of examples is not positive.

    Source: Bergsma et al. 2025 (arXiv 2505.13738v2), figure 1, for the exponent.
    """
    require(0 < examples < math.inf, "examples must be positive and finite", examples)
    ends = np.cumsum(evidence.examples)
    before, end = ends - evidence.examples, float(ends[-1])
    kept = before < examples
    cut = evidence._replace(
        examples=np.minimum(evidence.examples, examples - before)[kept],
        batch=evidence.batch[kept],
        noise_scale=evidence.noise_scale[kept],
    )
    if examples <= end:
        return cut
    last = ends > 0.75 * end
    taken, batch, scale = evidence.examples[last], evidence.batch[last], evidence.noise_scale[last]
    # at equal factors, over which a power law rises by equal factors
    edges = np.geomspace(end, examples, SEGMENTS + 1)
    more = np.diff(edges)
    # Logarithms of how far each segment lies beyond the middle of the quarter that was measured.
    beyond = np.log(np.sqrt(edges[1:] * edges[:-1]) / (0.875 * end))
    # a mean over all examples of the run, because one band holds for all segments
    rise = math.exp(RISE * float((more * beyond).sum()) / examples)
    low, high = evidence.band
    return Evidence(
        np.append(cut.examples, more),
        # examples over steps: the mean batch of the last quarter
        np.append(cut.batch, np.full(SEGMENTS, taken.sum() / (taken / batch).sum())),
        # the geometric mean, since the errors of a noise scale are factors
        np.append(cut.noise_scale, np.exp(np.average(np.log(scale), weights=taken) + RISE * beyond)),
        # squared: twice the error in logarithms
        _independent([(low**2, high**2), (1 / rise, rise)]),
    )


def _independent(bands: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The band of several independent errors, each a factor at most 1 and one at least 1."""
    low, high = (math.hypot(*(math.log(band[at]) for band in bands)) for at in (0, 1))
    return math.exp(-low), math.exp(high)


def _times(range_: Range, factor: float) -> Range:
    return Range(*(value * factor for value in range_))


def _check(evidence: Evidence, cost: StepCost, limits: tuple[float | None, float | None], batch: float | None) -> None:
    scale = evidence.noise_scale
    if not (scale.size and np.isfinite(scale).all() and (scale > 0).all()):
        raise ValueError("noise scales must be positive and finite, and at least one")
    if not 0 < cost.example < math.inf or not 0 <= cost.step < math.inf or not 0 <= cost.gradient_bytes < math.inf:
        raise ValueError(f"an example must take a positive time, a step and its bytes zero or more, got {cost}")
    require(0 < cost.pivot < math.inf, "the pivot must be a positive number of examples", cost.pivot)
    for name, (low, high) in (("band", evidence.band), ("spread", cost.spread), ("price_band", cost.price_band)):
        if not 0 < low <= 1 <= high < math.inf:
            raise ValueError(f"the {name} must be factors around 1, got {low} and {high}")
    low_limit, high_limit = limits
    if low_limit is not None and high_limit is not None and low_limit > high_limit:
        raise ValueError(f"the smallest batch, {low_limit:g}, must not exceed the largest, {high_limit:g}")
    require(batch is None or 0 < batch < math.inf, "a constant batch must be positive and finite", batch)
