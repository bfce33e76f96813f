"""The control: which batch size a run may have. The only place that decides.

A criterion says what the gradient asks for; noise is large, so what it says is averaged, given an error bar, and
followed only where following is worth it. Noise and signal are averaged apart, in per-example units, so that the
averages stay valid when the batch changes, and are divided last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from statistics import NormalDist
from typing import Any, NamedTuple

from adabatch.batch.criteria import Criterion, Observation
from adabatch.batch.moments import EUCLIDEAN, GradientMoments
from adabatch.batch.plan import BatchPlan, PlanGrid, Progress
from adabatch.batch.schedules import Schedule
from adabatch.batch.step_times import StepTimes

ROUNDING_TOLERANCE = 1 / 8
"""Relative error of the batch size that a criterion (not a schedule) accepts for a larger micro-batch: at most half an
accumulation step in four, far below the error bar of any estimate."""


UNLIMITED = 2**62
"""Examples beyond any batch: what an infinite size is cut to, and the ceiling of a schedule without limits."""


class Reason(StrEnum):
    """Why the next plan is what it is; the words of the journal."""

    GROW = "grow"
    SHRINK = "shrink"
    SCHEDULED = "scheduled"
    AGREES = "agrees"
    NOT_PROBED = "not probed"
    NOT_FINITE = "not finite"
    WEIGHS_NOTHING = "weighs nothing"
    NO_NOISE = "no noise"
    NO_SIGNAL = "no signal"
    MONOTONE = "monotone"
    HYSTERESIS = "within hysteresis"
    NOT_SIGNIFICANT = "not significant"
    HOLD = "hold"
    AT_LIMIT = "at limit"


@dataclass(frozen=True)
class Limits:
    """The smallest and largest global batch size, in examples; either may be a schedule.

    Raises:
        ValueError: a size below 1, anything but whole numbers and schedules, or limits crossed.
    """

    min: int | Schedule
    max: int | Schedule

    def __post_init__(self) -> None:
        for name, limit in (("min", self.min), ("max", self.max)):
            if not isinstance(limit, int | Schedule):
                raise ValueError(f"limits.{name} must be a whole number of examples or a schedule, got {limit!r}")
            if isinstance(limit, int) and limit < 1:
                raise ValueError(f"limits.{name} must be at least 1 example, got {limit}")
        if isinstance(self.min, int) and isinstance(self.max, int) and self.min > self.max:
            raise ValueError(f"limits are crossed: min={self.min} is above max={self.max}")

    def at(self, progress: Progress) -> tuple[int, int]:
        """Floor and ceiling at this progress; where schedules cross, the ceiling holds."""
        low = self.min if isinstance(self.min, int) else math.ceil(min(self.min.size(progress), UNLIMITED))
        high = self.max if isinstance(self.max, int) else math.floor(min(self.max.size(progress), UNLIMITED))
        return min(low, high), high

    def runnable(self, progress: Progress, grid: PlanGrid) -> tuple[int, int]:
        """Floor and ceiling with a plan between them: where a moving floor leaves none, it yields to the largest plan.

        A ceiling never yields: below the smallest plan, nothing can be run.
        """
        low, high = self.at(progress)
        return min(low, grid.next_below(high + 1) or low), high


@dataclass(frozen=True, kw_only=True)
class Control:
    """How cautiously the plan follows the criterion. ``Control.direct()`` follows every test, as the papers do.

    Args:
        interval: a probe every so many steps.
        memory: probes in the average: an exponential window with the weight of ``memory`` equal ones (a factor of
            ``(memory - 1) / (memory + 1)`` a probe). 1 keeps only the last, ``inf`` forgets none. The default forgets
            at a rate of 0.82 a probe, near the 0.9 of arXiv 2602.03001.
        confidence: one-sided probability with which the wanted batch must lie beyond the present one before it is
            followed, in [0.5, 1). 0.5 asks for no certainty, and is all that ``memory=1`` can give.
        hysteresis: relative change below which nothing moves (0.1: AdaptDL's 0.05 on noisier statistics, doubled).
        hold: steps after a change in which no other follows.
        growth: largest factor of one change, either way, above 1; ``inf`` for none.
        monotone: whether the batch may only grow.

    Raises:
        ValueError: a value outside its range, or a confidence that a memory of one probe cannot give.
    """

    interval: int = 1
    memory: float = 10
    confidence: float = 0.9
    hysteresis: float = 0.1
    hold: int = 0
    growth: float = 2.0
    monotone: bool = True

    def __post_init__(self) -> None:
        checks = {
            "interval": (self.interval >= 1, "at least 1 step"),
            "memory": (self.memory >= 1, "at least 1 probe"),
            "confidence": (0.5 <= self.confidence < 1, "in [0.5, 1)"),
            "hysteresis": (0 <= self.hysteresis < math.inf, "zero or positive"),
            "hold": (self.hold >= 0, "zero or more steps"),
            "growth": (self.growth > 1, "above 1"),
        }
        for name, (holds, allowed) in checks.items():
            if not holds:
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)}")
        if self.memory == 1 and self.confidence > 0.5:
            raise ValueError(
                f"memory=1 keeps one probe, whose spread nobody knows, so with confidence={self.confidence} no change "
                f"would ever be significant: use confidence=0.5, or a memory of 2 or more"
            )

    @classmethod
    def direct(cls, *, interval: int = 1) -> Control:
        """Every test is followed at once and in full: no average, no error bar, no cap; growth only."""
        return cls(interval=interval, memory=1, confidence=0.5, hysteresis=0.0, growth=math.inf)

    @property
    def decay(self) -> float:
        """Weight of the past at each new probe."""
        return 1 - 2 / (self.memory + 1)


@dataclass(frozen=True, kw_only=True)
class Averages:
    """Exponentially weighted averages of noise and signal over probes, with their covariance.

    The recursion is West's (1979) for weighted means; ``weight`` and ``weight_sq`` are the sums of weights and of their
    squares, so the averages need no bias correction and ``num_effective`` equal probes stand behind them. They are of
    one norm: a measurement in another begins new ones.
    """

    weight: float = 0.0
    weight_sq: float = 0.0
    noise: float = 0.0
    signal: float = 0.0
    noise_along: float | None = None
    noise_at_quantile: float | None = None
    norm: str = EUCLIDEAN
    spread_noise: float = 0.0
    spread_signal: float = 0.0
    spread_both: float = 0.0

    @property
    def num_effective(self) -> float:
        """How many equally weighted probes would be as certain."""
        return self.weight**2 / self.weight_sq if self.weight_sq else 0.0

    @property
    def noise_scale(self) -> float:
        """``noise / signal`` of the averages, in examples; NaN where the signal is not positive."""
        return self.noise / self.signal if self.signal > 0 else math.nan

    def after(self, moments: GradientMoments, decay: float) -> Averages:
        """The averages with one more probe in them, the past weighted by ``decay``."""
        if moments.norm != self.norm:
            return Averages(norm=moments.norm).after(moments, decay)
        noise, signal = moments.noise, moments.signal
        weight = decay * self.weight + 1
        d_noise, d_signal = noise - self.noise, signal - self.signal
        mean_noise, mean_signal = self.noise + d_noise / weight, self.signal + d_signal / weight

        def mean(past: float | None, new: float | None) -> float | None:
            return new if past is None or new is None else past + (new - past) / weight

        return Averages(
            weight=weight,
            weight_sq=decay**2 * self.weight_sq + 1,
            noise=mean_noise,
            signal=mean_signal,
            noise_along=mean(self.noise_along, moments.noise_along),
            noise_at_quantile=mean(self.noise_at_quantile, moments.noise_at_quantile),
            norm=self.norm,
            spread_noise=decay * self.spread_noise + d_noise * (noise - mean_noise),
            spread_signal=decay * self.spread_signal + d_signal * (signal - mean_signal),
            spread_both=decay * self.spread_both + d_noise * (signal - mean_signal),
        )

    def moments(self, plan: BatchPlan) -> GradientMoments:
        """What a step of ``plan`` would measure from single examples if noise and signal were these averages."""
        # Averages do not know the size of the parts they come from. Single examples lose the fewest digits, and are
        # parts of a plan of one micro-batch too; a batch of one example is taken in halves.
        return GradientMoments.from_noise(
            self.noise,
            self.signal,
            part_size=min(1.0, plan.global_batch_size / 2),
            num_examples=plan.global_batch_size,
            noise_along=self.noise_along,
        )._replace(noise_at_quantile=self.noise_at_quantile, norm=self.norm)

    def covariance(self) -> tuple[float, float, float]:
        """Variance of the average noise, of the average signal, and their covariance; infinite from one probe."""
        freedom = self.weight - self.weight_sq / self.weight if self.weight else 0.0
        if freedom <= 1e-12:
            return math.inf, math.inf, 0.0
        scale = 1 / (freedom * self.num_effective)
        return self.spread_noise * scale, self.spread_signal * scale, self.spread_both * scale


class Estimate(NamedTuple):
    """A wanted batch size with its error bar, in examples."""

    wanted: float
    low: float
    high: float


def _quantile(confidence: float, freedom: float) -> float:
    """Student's t quantile by the Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5); zero at 0.5."""
    z = NormalDist().inv_cdf(confidence)
    if z == 0:
        return 0.0
    if freedom <= 0:
        return math.inf
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2


def estimate(
    criterion: Criterion, averages: Averages, plan: BatchPlan, *, seen: Observation, confidence: float
) -> Estimate:
    """What ``criterion`` asks for on the averages, with a one-sided error bar either way.

    The bar is that of the logarithm of the wanted size to first order (delta method), so it does not change when all
    gradients are scaled; the derivatives are taken numerically, so any criterion has one. Upwards it reaches to what
    the criterion asks for at the edge of the confidence region, if that is further, and has no end where no signal is
    left there (Fieller 1954 for a quotient): to first order alone it would hold the true size too seldom.

    Args:
        criterion: says what the gradient asks for.
        averages: noise and signal, which stand in the place of the moments ``seen``.
        plan: of the step that ends.
        seen: what is known beside them.
        confidence: one-sided probability of the bar.
    """

    def wanted(noise: float, signal: float) -> float:
        # Other measures of the noise are taken to be as uncertain, relatively, as the noise.
        times = noise / averages.noise if averages.noise else 1.0
        along, quantile = averages.noise_along, averages.noise_at_quantile
        moved = replace(
            averages,
            noise=noise,
            signal=signal,
            noise_along=None if along is None else along * times,
            noise_at_quantile=None if quantile is None else quantile * times,
        )
        return criterion.wanted(seen._replace(moments=moved.moments(plan)))

    center = wanted(averages.noise, averages.signal)
    if not (math.isfinite(center) and center > 0):
        return Estimate(center, math.nan, math.nan)
    t = _quantile(confidence, averages.num_effective - 1)
    if t == 0:
        return Estimate(center, center, center)
    var_noise, var_signal, cov = averages.covariance()
    if not math.isfinite(var_noise) or not math.isfinite(t):
        return Estimate(center, 0.0, math.inf)

    def slope(up: float, down: float, width: float) -> float:
        if not (math.isfinite(up) and math.isfinite(down) and up > 0 and down > 0):
            return math.inf
        return (math.log(up) - math.log(down)) / width

    n, s = averages.noise, averages.signal
    dn, ds = 1e-4 * abs(n), 1e-4 * max(abs(s), abs(n) / plan.global_batch_size)
    by_noise = slope(wanted(n + dn, s), wanted(n - dn, s), 2 * dn)
    by_signal = slope(wanted(n, s + ds), wanted(n, s - ds), 2 * ds)
    if not (math.isfinite(by_noise) and math.isfinite(by_signal)):
        return Estimate(center, 0.0, math.inf)
    to_noise, to_signal = var_noise * by_noise + cov * by_signal, cov * by_noise + var_signal * by_signal
    error = math.sqrt(max(0.0, by_noise * to_noise + by_signal * to_signal))
    # Past e^50 the interval says nothing; the cap only keeps exp() finite.
    reach = math.exp(min(50.0, t * error))
    far = wanted(n + t * to_noise / error, s + t * to_signal / error) if error > 0 else center
    return Estimate(center, center / reach, math.inf if math.isnan(far) else max(far, center * reach))


@dataclass(frozen=True, kw_only=True)
class ControlState:
    """What the control remembers between steps: plain numbers, equal on all ranks."""

    averages: Averages = field(default_factory=Averages)
    hold: int = 0
    until_probe: int = 0
    times: StepTimes = field(default_factory=StepTimes)

    def state_dict(self) -> dict[str, Any]:
        """The numbers as a nested dict."""
        return {**asdict(self), "times": self.times.state_dict()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> ControlState:
        """The inverse of ``state_dict``."""
        return cls(
            averages=Averages(**state["averages"]),
            hold=state["hold"],
            until_probe=state["until_probe"],
            times=StepTimes.from_state_dict(state.get("times", ())),
        )


class Decision(NamedTuple):
    """The plan of the next step and how it came about.

    Args:
        plan: what the next step takes.
        reason: why.
        estimate: what the criterion asked for, with its error bar; None where nothing was asked.
        state: what the control remembers.
    """

    plan: BatchPlan
    reason: Reason
    estimate: Estimate | None
    state: ControlState


def decide(
    criterion: Criterion,
    moments: GradientMoments | None,
    *,
    control: Control,
    limits: Limits,
    grid: PlanGrid,
    plan: BatchPlan,
    progress: Progress,
    state: ControlState,
    loss: float | None = None,
    timed: tuple[BatchPlan, float] | None = None,
) -> Decision:
    """The plan of the next step.

    Args:
        criterion: says what the gradient asks for; one that needs no probe (a schedule) is followed as it is, inside
            the limits.
        moments: what this step measured; None where it was not probed.
        control, limits, grid: how far and how fast the plan may move, and which plans can be run.
        plan: the plan of the step that ends.
        progress: what is consumed when the next step begins.
        state: what the control remembers from the steps before.
        loss: mean loss of the step; None where it was not measured.
        timed: a plan and how long a step of it took, in seconds; None where nothing was timed.
    """
    low, high = limits.runnable(progress, grid)
    held = state.hold > 0
    state = replace(state, hold=max(0, state.hold - 1), until_probe=max(0, state.until_probe - 1))
    usable = moments is not None and _usable(moments)
    if moments is not None:
        averages = state.averages.after(moments, control.decay) if usable else state.averages
        state = replace(state, until_probe=control.interval - 1, averages=averages)
    if timed is not None:
        state = replace(state, times=state.times.after(*timed))
    seen = Observation(moments, progress, loss, None if timed is None else timed[1], state.times, grid)
    asked: Estimate | None = None
    reason = Reason.NOT_PROBED
    if not criterion.needs:
        size = criterion.wanted(seen)
        asked, reason = Estimate(size, size, size), Reason.NOT_FINITE
        if not math.isnan(size):
            return Decision(grid.nearest(size, min_size=low, max_size=high), Reason.SCHEDULED, asked, state)
    elif usable:
        asked, reason = _follow(criterion, control, plan, seen, state.averages, held=held)
    elif moments is not None and not (moments.is_finite and moments.num_parts < 2):
        reason = Reason.NOT_FINITE
    wanted = math.ceil(asked.wanted) if asked and reason in (Reason.GROW, Reason.SHRINK) else plan.global_batch_size
    chosen, reason = _carried_out(wanted, reason, plan, control.growth, grid, low, high)
    if chosen != plan:
        state = replace(state, hold=control.hold)
    return Decision(chosen, reason, asked, state)


def _usable(moments: GradientMoments) -> bool:
    """Whether averages can take it in: a number that is not finite, or whose square is not, would never leave them."""
    measured = (moments.noise, moments.signal, moments.noise_along or 0.0, moments.noise_at_quantile or 0.0)
    return all(abs(number) < 1e150 for number in measured)


def _follow(
    criterion: Criterion,
    control: Control,
    plan: BatchPlan,
    seen: Observation,
    averages: Averages,
    *,
    held: bool,
) -> tuple[Estimate, Reason]:
    """What the criterion asks for, and whether to follow it, before limits and rounding."""
    present = plan.global_batch_size
    asked = estimate(criterion, averages, plan, seen=seen, confidence=control.confidence)
    wanted = asked.wanted
    band = 1 + control.hysteresis
    if math.isnan(wanted):
        return asked, Reason.NOT_FINITE
    if wanted == math.inf:
        return asked, Reason.NO_SIGNAL
    if wanted <= 0:
        return asked, Reason.NO_NOISE
    if present <= wanted * band and wanted <= present * band:
        return asked, Reason.HYSTERESIS if control.hysteresis else Reason.AGREES
    if wanted < present and control.monotone:
        return asked, Reason.MONOTONE
    if asked.low <= present <= asked.high and asked.low < asked.high:
        return asked, Reason.NOT_SIGNIFICANT
    if held:
        return asked, Reason.HOLD
    return asked, Reason.GROW if wanted > present else Reason.SHRINK


def _carried_out(
    wanted: int, reason: Reason, plan: BatchPlan, growth: float, grid: PlanGrid, low: int, high: int
) -> tuple[BatchPlan, Reason]:
    """The plan that comes near to ``wanted`` without turning back, passing the cap or leaving the limits; and why."""

    def nearest(size: float, low: float, high: float) -> BatchPlan:
        return grid.nearest(size, min_size=low, max_size=high, tolerance=ROUNDING_TOLERANCE)

    present = plan.global_batch_size
    least, most = present / growth, present * growth
    if not low <= present <= high:  # a moving limit moves the plan, whatever the gradient says
        return nearest(min(max(wanted, least), most), low, high), Reason.AT_LIMIT
    if reason not in (Reason.GROW, Reason.SHRINK):
        return plan, reason
    uncapped = nearest(wanted, low, high).global_batch_size
    # One quantum is allowed however small the cap: a batch of few quanta would else never move.
    if reason is Reason.GROW:
        step = grid.next_above(present)
        stops, agrees = step > high, uncapped <= present
        within: tuple[float, float] = (step, min(high, max(step, most)))
    else:
        step = grid.next_below(present)
        stops, agrees = step < low, uncapped >= present
        within = (max(low, min(step, least)), step)
    if stops or agrees:
        return plan, Reason.AT_LIMIT if stops else Reason.AGREES
    return nearest(wanted, *within), reason
