"""What a criterion asks for on averages, with an error bar: the size that the control may follow."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from statistics import NormalDist
from typing import NamedTuple

from adabatch.batch.averages import Averages
from adabatch.batch.criteria import Criterion, Observation, resting_size
from adabatch.batch.plan import BatchPlan


class Estimate(NamedTuple):
    """A wanted batch size with its error bar, in examples.

    Args:
        wanted: what the criterion asks for; infinite if no signal was seen.
        low: one-sided lower bound, finite even then; NaN if there is none.
        high: one-sided upper bound.
        freedom: degrees of freedom of the estimate (`Averages.freedom`); None if nothing was measured.
    """

    wanted: float
    low: float
    high: float
    freedom: float | None = None


def _quantile(confidence: float, freedom: float) -> float:
    """Student's t quantile by the Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5); zero at 0.5."""
    # not scipy's exact quantile, since scipy is no dependency
    z = NormalDist().inv_cdf(confidence)
    if z == 0:
        return 0.0
    # one probe has no spread, and no finite bar covers what it may hide
    if freedom <= 0:
        return math.inf
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2


def estimate(
    criterion: Criterion,
    averages: Averages,
    plan: BatchPlan,
    *,
    seen: Observation,
    confidence: float,
    shrink_confidence: float | None = None,
    plug_in: bool = False,
) -> Estimate:
    """What ``criterion`` asks for on the averages, with a one-sided error bar in each direction.

    If the criterion knows where it comes to rest (`Resting`), that size is used. A single norm test asks for hardly
    more than the present batch long before it rests, so that rounding and hysteresis would stop the growth too early:
    with eta 0.9 at less than half of the final batch, or even at the first one.

    The bar is that of the logarithm of the wanted size to first order (delta method), so it does not change when all
    gradients are scaled; the derivatives are numerical, so that it works for every criterion. In each direction it
    reaches at least to what the criterion asks for at the edge of the confidence region, which is exact if the signal
    is the uncertain part (Fieller 1954 for a quotient). The upper bound is then infinite if no signal is left at that
    edge, and the lower bound is finite even if no signal was seen.

    Args:
        criterion: says what the gradient asks for.
        averages: noise and signal, which replace the moments of ``seen``.
        plan: of the step that ends.
        seen: everything else that is known.
        confidence: one-sided probability of the lower bound, which decides on growth.
        shrink_confidence: that of the upper bound; by default the same.
        plug_in: use the size that a single test asks for, as the papers do, not the one at which it comes to rest.
    """
    asks = criterion.wanted if plug_in else resting_size(criterion)

    def wanted(noise: float, signal: float) -> float:
        # Other measures of the noise are taken to be as uncertain, relatively, as the noise.
        times = noise / averages.noise if averages.noise else 1.0
        along, quantile = averages.noise_along, averages.noise_at_quantile
        shifted = replace(
            averages,
            noise=noise,
            signal=signal,
            noise_along=None if along is None else along * times,
            noise_at_quantile=None if quantile is None else quantile * times,
        )
        return asks(seen._replace(moments=shifted.moments(plan)))

    n, s, freedom = averages.noise, averages.signal, averages.freedom
    center = wanted(n, s)
    if math.isnan(center) or center <= 0:  # no logarithm, and so no bar
        return Estimate(center, math.nan, math.nan, freedom)
    # Student's t, because the spread comes from the same few probes as the averages.
    below, above = (
        _quantile(one, averages.num_effective - 1)
        for one in (confidence, confidence if shrink_confidence is None else shrink_confidence)
    )
    var_noise, var_signal, cov = averages.covariance()
    bounded = math.isfinite(var_noise) and math.isfinite(below) and math.isfinite(above)
    if math.isinf(center):
        # No signal: the upper bound is infinite too. The lower bound is the size for the largest signal that the data
        # do not exclude, so that a batch may grow out of pure noise.
        if below == 0 or not bounded or var_signal <= 0:
            return Estimate(center, math.nan, math.inf, freedom)
        error = math.sqrt(var_signal)
        return Estimate(center, wanted(n + below * cov / error, s + below * error), math.inf, freedom)
    if below == above == 0:  # confidence 0.5 asks for no bar, also after a single probe
        return Estimate(center, center, center, freedom)
    if not bounded:
        return Estimate(center, 0.0, math.inf, freedom)

    by_noise, by_signal = _log_slopes(wanted, n, s, plan.global_batch_size)
    if not (math.isfinite(by_noise) and math.isfinite(by_signal)):
        return Estimate(center, 0.0, math.inf, freedom)
    to_noise, to_signal = var_noise * by_noise + cov * by_signal, cov * by_noise + var_signal * by_signal
    error = math.sqrt(max(0.0, by_noise * to_noise + by_signal * to_signal))
    if error == 0:
        return Estimate(center, center, center, freedom)

    # The point of the confidence ellipse in whose direction the wanted size changes most.
    def edge(t: float) -> float:
        return wanted(n + t * to_noise / error, s + t * to_signal / error)

    # Past e^50 the interval says nothing; the cap only keeps exp() finite.
    low, high = (center * math.exp(max(-50.0, min(50.0, t * error))) for t in (-below, above))
    # The linear bar is too short if the signal is uncertain: the exact size at the edge of the region widens it.
    near, far = edge(-below), edge(above)
    return Estimate(
        center,
        low if math.isnan(near) else min(max(near, low), center),
        math.inf if math.isnan(far) else max(far, high),
        freedom,
    )


def _log_slopes(wanted: Callable[[float, float], float], n: float, s: float, batch: int) -> tuple[float, float]:
    """Derivatives of the logarithm of the wanted size by noise and by signal; infinite where there is none."""

    def slope(up: float, down: float, width: float) -> float:
        if width == 0:  # no noise at all, but the criterion still asks for a size
            return 0.0
        if not (math.isfinite(up) and math.isfinite(down) and up > 0 and down > 0):
            return math.inf
        return (math.log(up) - math.log(down)) / width

    # Steps of the differences. The signal may be tiny or zero, so its step is at least on the scale of the noise in
    # the gradient of the batch.
    dn, ds = 1e-4 * abs(n), 1e-4 * max(abs(s), abs(n) / batch)
    if 0 < s <= ds:  # both sides of the difference must have a positive signal
        ds = s / 2
    # numerical, since a criterion is any object with `wanted`; asking it for derivatives too would burden every new one
    by_noise = slope(wanted(n + dn, s), wanted(n - dn, s), 2 * dn)
    return by_noise, slope(wanted(n, s + ds), wanted(n, s - ds), 2 * ds)
