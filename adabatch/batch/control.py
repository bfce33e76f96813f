"""The control: which batch size a run may have. The only place that decides.

A criterion says which batch size the gradient asks for. Its estimate is noisy, so it is averaged (`averages`), given an
error bar, and followed only if the change is significant. The batch grows and shrinks, so that a change by chance is
undone; a batch that may only grow would accumulate every mistake of the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, NamedTuple

from adabatch.arguments import MOST_STEPS, check_fields, checked, require
from adabatch.batch.averages import Averages, ProbeWindow
from adabatch.batch.criteria import Criterion, Observation
from adabatch.batch.estimates import Estimate, estimate
from adabatch.batch.moments import GradientMoments
from adabatch.batch.plan import BatchPlan, Duration, PlanGrid, Progress
from adabatch.batch.schedules import Schedule
from adabatch.batch.step_times import StepTimes

ROUNDING_TOLERANCE = 1 / 8
"""Relative error of the batch size that a criterion (not a schedule) accepts for a larger micro-batch: at most half an
accumulation step in four, far below the error bar of any estimate."""


LONGEST_MEMORY = 50
"""Probes to which the window grows. Above 50 the error bar hardly narrows, while the noise scale changes."""

LONGEST_INTERVAL = 10
"""Steps between two probes to which the automatic interval grows: a probe that costs 5 % of a step is then 0.5 %."""

UNLIMITED = 2**62
"""More examples than any batch has: the value for an infinite size, and the ceiling of a schedule without limits."""


class Reason(StrEnum):
    """The reason for the next plan, in the words of the journal."""

    GROW = "grow"
    SHRINK = "shrink"
    SCHEDULED = "scheduled"
    AGREES = "agrees"
    NOT_PROBED = "not probed"
    NOT_FINITE = "not finite"
    WEIGHS_NOTHING = "weighs nothing"
    NOT_COMMITTED = "not committed"
    NO_NOISE = "no noise"
    NO_SIGNAL = "no signal"
    MONOTONE = "monotone"
    HYSTERESIS = "within hysteresis"
    NOT_SIGNIFICANT = "not significant"
    HOLD = "hold"
    WARM_UP = "warm-up"
    PACE = "pace"
    AT_LIMIT = "at limit"


@dataclass(frozen=True)
class Limits:
    """The smallest and largest global batch size, in examples; either may be a schedule.

    Raises:
        ValueError: if a size is below 1, or neither a whole number nor a schedule, or if ``min`` is above ``max``.
    """

    min: int | Schedule
    max: int | Schedule

    def __post_init__(self) -> None:
        check_fields(self, "limits.")
        for name, limit in (("min", self.min), ("max", self.max)):
            if isinstance(limit, Schedule):
                continue
            require(limit >= 1, f"limits.{name} must be at least 1 example", limit)
        if isinstance(self.min, int) and isinstance(self.max, int) and self.min > self.max:
            raise ValueError(f"limits are crossed: min={self.min} is above max={self.max}")

    def at(self, progress: Progress) -> tuple[int, int]:
        """Floor and ceiling at this progress; if the two schedules cross, the ceiling holds."""
        # A floor is rounded up and a ceiling down, so that neither is passed. The min is there because a schedule may
        # be infinite (Seesaw at the end of its shape), and ceil(inf) is an OverflowError.
        low = self.min if isinstance(self.min, int) else math.ceil(min(self.min.size(progress), UNLIMITED))
        high = self.max if isinstance(self.max, int) else math.floor(min(self.max.size(progress), UNLIMITED))
        return min(low, high), high

    def runnable(self, progress: Progress, grid: PlanGrid) -> tuple[int, int]:
        """Floor and ceiling with a plan between them: if a moving floor leaves none, it is lowered to the largest plan.

        The ceiling is never raised, because nothing can be run below the smallest plan.
        """
        low, high = self.at(progress)
        # No plan below the ceiling at all leaves the floor as it is, and `nearest` says that they do not fit.
        return min(low, grid.next_below(high + 1) or low), high


@dataclass(frozen=True, kw_only=True)
class Control:
    """How cautiously the plan follows the criterion.

    Args:
        interval: number of steps from one probe to the next. It is 1 by default, because the checks that tell all ranks
            of one rank's mistake use the reduction of a probed step. None is automatic: every step at first, and rarer
            as the window grows. Once it has its 50 probes, the interval is ``memory_share`` of the probes since noise
            or signal last jumped, over 50, and at most 10. With the other defaults this is every 2nd step after 500
            probes, every 10th after 2,500, and every step again after a jump; the batch then follows a jump after 25
            steps instead of 4 (``benchmarks/results/interval.md``).
        memory: least number of probes in the average: an exponential window with the weight of ``memory`` equal ones (a
            factor of ``(memory - 1) / (memory + 1)`` per probe). 1 keeps only the last probe, without a test for
            outliers; ``inf`` forgets none.
        memory_share: the window grows to this share of the probes since noise or signal last jumped, up to 50 of them;
            0 keeps it at ``memory``.
        confidence: one-sided probability with which the wanted batch must lie above the present one before the batch
            grows, in [0.5, 1). It holds for one decision, not for all of a run. 0.5 needs no certainty, and is the only
            value that is possible with ``memory=1``.
        shrink_confidence: the probability with which it must lie below before the batch shrinks; by default half as far
            from certainty, 0.95 for 0.9, because a batch that shrinks and grows again by chance costs twice.
        hysteresis: relative change below which the plan is kept (0.1: AdaptDL's 0.05, doubled for noisier statistics).
        hold: length of the stretch after a change in which no other change follows, in steps (a number, or
            ``adabatch.steps``) or in ``adabatch.examples``.
        growth: largest factor of one change, in either direction, above 1; ``inf`` for no limit.
        pace: the batch grows to at most this share of all examples consumed so far, so that the noise at the start of a
            run, which often differs from that of the rest, cannot move it far: at 0.1 a doubling takes at least ten
            steps at the beginning, and is immediate late in the run. ``inf`` for no pace.
        hold_until: how much of the run must be over before the batch grows; ``adabatch.examples(0)`` for no wait. If
            None, the caller of ``decide`` chooses; ``AdaptiveBatch`` uses the warm-up of its schedule.
        monotone: whether the batch may only grow. It then keeps every growth that came by chance: if the noise scale
            varies by 30 %, the batch is at 1.5 to 2 times the right size after a few hundred probes.

    ``hold``, ``pace`` and ``hold_until`` do not apply to schedules, nor to changes that the limits require.

    Raises:
        ValueError: if a value is outside its range, or if ``memory=1`` cannot give the confidence.
    """

    interval: int | None = 1
    memory: float = 10
    memory_share: float = 0.2
    confidence: float = 0.9
    shrink_confidence: float | None = None
    hysteresis: float = 0.1
    hold: int | Duration = 0
    growth: float = 2.0
    pace: float = 0.1
    hold_until: Duration | None = None
    monotone: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        hold = self.hold.count if isinstance(self.hold, Duration) else self.hold
        shrink = self.confidence if self.shrink_confidence is None else self.shrink_confidence
        checks = {
            "interval": (
                self.interval is None or 1 <= self.interval <= MOST_STEPS,
                f"at least 1 step (at most {MOST_STEPS:,}), or None",
            ),
            "memory": (self.memory >= 1, "at least 1 probe"),
            "memory_share": (0 <= self.memory_share <= 1, "in [0, 1]"),
            "confidence": (0.5 <= self.confidence < 1, "in [0.5, 1)"),
            "shrink_confidence": (0.5 <= shrink < 1, "in [0.5, 1)"),
            "hysteresis": (0 <= self.hysteresis < math.inf, "zero or positive"),
            "hold": (hold >= 0, "zero or more steps"),
            "growth": (self.growth > 1, "above 1"),
            "pace": (self.pace > 0, "a positive share, or inf for none"),
        }
        for name, (holds, allowed) in checks.items():
            require(holds, f"{name} must be {allowed}", getattr(self, name))
        if isinstance(self.hold, Duration) and self.hold.unit not in ("examples", "steps"):
            raise ValueError(f"hold must be in examples or steps, got {self.hold}")
        if not isinstance(self.hold_until, Duration | None):
            raise ValueError(
                f"hold_until must be a duration, such as adabatch.examples(5_000), got {self.hold_until!r}"
            )
        if self.memory == 1 and max(self.confidence, shrink) > 0.5:
            raise ValueError(
                f"memory=1 keeps one probe, whose spread is unknown, so with confidence={self.confidence} no change "
                f"would ever be significant: use confidence=0.5, or a memory of 2 or more"
            )

    @classmethod
    @checked
    def direct(cls, *, interval: int = 1) -> Control:
        """Every test is followed at once and in full: no average, no error bar, no cap, no pace; growth only.

        This is the control of the papers, provided to reproduce them. It was worse in every comparison: with eta 0.5 it
        ended at a loss of 0.086, against 0.076 for the default at that time and 0.041 for the best constant batch (a
        small CNN on MNIST), and at 2.44, against 2.1 to 2.2 for constant batches with the same number of steps (a
        language model of bytes).
        """
        return cls(
            interval=interval,
            memory=1,
            memory_share=0.0,
            confidence=0.5,
            hysteresis=0.0,
            growth=math.inf,
            pace=math.inf,
            hold_until=Duration(0, "examples"),
            monotone=True,
        )

    @property
    def decay(self) -> float:
        """Weight of the past at each new probe while the window has ``memory`` probes."""
        # An endless exponential window is as certain as (1 + decay) / (1 - decay) equal probes; this solves for
        # `memory`.
        return 1 - 2 / (self.memory + 1)

    def decay_after(self, num_probes: int) -> float:
        """Weight of the past at each new probe, ``num_probes`` after the last jump."""
        # 0 also tells `ProbeWindow` to test for no outliers, so no memory_share may lift it
        if self.memory == 1:
            return 0.0
        return 1 - 2 / (max(self.memory, min(self.memory_share * num_probes, LONGEST_MEMORY)) + 1)

    def interval_after(self, num_probes: int) -> int:
        """Steps from a probe to the next, after ``num_probes`` since the last jump."""
        if self.interval is not None:
            return self.interval
        return max(1, min(int(self.memory_share * num_probes / LONGEST_MEMORY), LONGEST_INTERVAL))

    @property
    def certain_below(self) -> float:
        """The confidence with which the batch shrinks."""
        if self.shrink_confidence is not None:
            return self.shrink_confidence
        # 0.5 asks for no certainty, in this direction either
        return (1 + self.confidence) / 2 if self.confidence > 0.5 else self.confidence

    @property
    def hold_steps(self) -> int:
        """Steps after a change in which no other follows; 0 if the hold is in examples."""
        if isinstance(self.hold, Duration):
            return self.hold.count if self.hold.unit == "steps" else 0
        return self.hold

    @property
    def hold_examples(self) -> int:
        """Examples after a change in which no other follows; 0 if the hold is in steps."""
        return self.hold.count if isinstance(self.hold, Duration) and self.hold.unit == "examples" else 0


@dataclass(frozen=True, kw_only=True)
class ControlState:
    """The state of the control between steps: plain numbers, equal on all ranks.

    Args:
        window: the measurements of the probes.
        hold: number of steps for which no change follows.
        until_probe: steps until the next probe.
        times: how long steps took.
        changed_at: examples that were consumed when the batch last changed; None if it never did.
    """

    window: ProbeWindow = field(default_factory=ProbeWindow)
    hold: int = 0
    until_probe: int = 0
    times: StepTimes = field(default_factory=StepTimes)
    changed_at: int | None = None

    @property
    def averages(self) -> Averages:
        """Noise and signal, averaged over the probes."""
        return self.window.averages

    def state_dict(self) -> dict[str, Any]:
        """The numbers as a nested dict."""
        return {
            "window": self.window.state_dict(),
            "hold": self.hold,
            "until_probe": self.until_probe,
            "times": self.times.state_dict(),
            "changed_at": self.changed_at,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> ControlState:
        """The inverse of ``state_dict``; also reads old states, which held only the averages of all probes."""
        if "window" in state:
            window = ProbeWindow.from_state_dict(state["window"])
        else:
            window = ProbeWindow.of(Averages(**state["averages"]))
        return cls(
            window=window,
            hold=state["hold"],
            until_probe=state["until_probe"],
            times=StepTimes.from_state_dict(state.get("times", ())),
            changed_at=state.get("changed_at"),
        )


class Decision(NamedTuple):
    """The plan of the next step, and the reasons for it.

    Args:
        plan: of the next step.
        reason: why.
        estimate: what the criterion asked for, with its error bar; None if it was not evaluated.
        state: of the control, for the next step.
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
    finite: bool = True,
    hold_until: Duration | None = None,
) -> Decision:
    """The plan of the next step.

    Args:
        criterion: says which size the gradient asks for; one that needs no probe (a schedule) is followed within the
            limits without any delay.
        moments: the measurement of this step; None if it was not probed.
        control, limits, grid: how far and how fast the plan may change, and which plans can be run.
        plan: the plan of the step that ends.
        progress: what is consumed when the next step begins.
        state: of the control, from the step before.
        loss: mean loss of the step; None if it was not measured.
        timed: a plan and how long a step of it took, in seconds; None if nothing was timed.
        finite: whether loss and gradient of the step are finite on all ranks; if not, its measurement is not used.
        hold_until: progress before which the batch does not grow, such as a schedule's warm-up, if ``control`` has no
            ``hold_until``.

    Raises:
        ValueError: if ``hold_until`` has a unit that the run does not count.
    """
    low, high = limits.runnable(progress, grid)
    usable = finite and moments is not None and _usable(moments)
    # of the state before this step, so that a hold of n covers n steps
    held = state.hold > 0 or _held_in_examples(control, state, progress)
    state = _after_step(state, control, moments, usable=usable, timed=timed)
    seen = Observation(
        moments if finite else None, progress, loss, None if timed is None else timed[1], state.times, grid
    )
    asked: Estimate | None = None
    goal, reason = math.nan, Reason.NOT_PROBED if finite else Reason.NOT_FINITE
    if not criterion.needs:
        size = criterion.wanted(seen)
        asked, reason = Estimate(size, size, size), Reason.NOT_FINITE
        # a schedule that cannot tell (NaN) holds the plan, as a probe that failed does
        # No tolerance in `nearest`: the sizes of a schedule are meant as they are, those of an estimate are not.
        if not math.isnan(size):
            return Decision(grid.nearest(size, min_size=low, max_size=high), Reason.SCHEDULED, asked, state)
    elif usable:
        asked = estimate(
            criterion,
            state.averages,
            plan,
            seen=seen,
            confidence=control.confidence,
            shrink_confidence=control.certain_below,
            # the papers that `Control.direct` reproduces follow single tests
            plug_in=control.memory == 1,
        )
        goal, reason = _followed(asked, control, plan.global_batch_size, held=held)
    # A single part has no noise: that is "not probed", not a failure.
    elif moments is not None and not (moments.is_finite and moments.num_parts < 2):
        reason = Reason.NOT_FINITE
    most = control.growth * plan.global_batch_size
    if reason is Reason.GROW:
        wait = hold_until if control.hold_until is None else control.hold_until
        paced = math.inf if control.pace == math.inf else control.pace * progress.examples
        next_above = grid.next_above(plan.global_batch_size)
        # The limit first: it lasts, while the warm-up and the pace pass.
        if next_above > high:
            reason = Reason.AT_LIMIT
        elif wait is not None and not progress.reached(wait):
            reason = Reason.WARM_UP
        # Not in many tiny steps: what the pace allows must exceed the hysteresis too.
        elif paced < max(next_above, plan.global_batch_size * (1 + control.hysteresis)):
            reason = Reason.PACE
        most = min(most, paced)
    if reason not in (Reason.GROW, Reason.SHRINK):
        # Not the wanted size: a moving limit may still require a change, which starts from the present size.
        goal = plan.global_batch_size
    # min: an infinite goal has no ceil
    chosen, reason = _carried_out(min(goal, UNLIMITED), reason, plan, control.growth, most, grid, low, high)
    if chosen != plan:
        state = replace(state, hold=control.hold_steps, changed_at=progress.examples)
    return Decision(chosen, reason, asked, state)


def _after_step(
    state: ControlState,
    control: Control,
    moments: GradientMoments | None,
    *,
    usable: bool,
    timed: tuple[BatchPlan, float] | None,
) -> ControlState:
    """The state with a step counted, and with what it measured and timed."""
    window, until_probe = state.window, max(0, state.until_probe - 1)
    if moments is not None:
        if usable:
            window = window.after(moments, decay=control.decay_after(window.num_probes + 1))
        # After the window has taken the probe: a jump resets its count, and probes come every step again.
        until_probe = control.interval_after(window.num_probes) - 1
    times = state.times if timed is None else state.times.after(*timed)
    return replace(state, window=window, hold=max(0, state.hold - 1), until_probe=until_probe, times=times)


def _held_in_examples(control: Control, state: ControlState, progress: Progress) -> bool:
    return state.changed_at is not None and progress.examples < state.changed_at + control.hold_examples


def _usable(moments: GradientMoments) -> bool:
    """Whether averages may use it: a number that is not finite, or whose square is not, would never leave them."""
    measured = (moments.noise, moments.signal, moments.noise_along or 0.0, moments.noise_at_quantile or 0.0)
    # squares of numbers below 1e150, and sums of them, stay finite in float64
    return all(abs(number) < 1e150 for number in measured)


def _followed(asked: Estimate, control: Control, present: int, *, held: bool) -> tuple[float, Reason]:
    """The size to move to and why, before pace, limits and rounding."""
    wanted, band = asked.wanted, 1 + control.hysteresis
    if math.isnan(wanted):
        return wanted, Reason.NOT_FINITE
    if wanted <= 0:
        return wanted, Reason.NO_NOISE
    if wanted == math.inf:
        # No signal was seen, but what is too small to be seen has a largest size, and so the batch a smallest.
        if not asked.low > present * band:
            return wanted, Reason.NO_SIGNAL
        return asked.low, Reason.HOLD if held else Reason.GROW
    # the same factor up and down, as the error bar is one of the logarithm
    if present <= wanted * band and wanted <= present * band:
        return wanted, Reason.HYSTERESIS if control.hysteresis else Reason.AGREES
    # Monotone before the error bar: the journal then says why the batch never shrinks, however certain the estimate.
    if wanted < present and control.monotone:
        return wanted, Reason.MONOTONE
    # An empty bar (confidence 0.5) follows every estimate.
    if asked.low <= present <= asked.high and asked.low < asked.high:
        return wanted, Reason.NOT_SIGNIFICANT
    # Last, so that "hold" in the journal means that the batch would have changed otherwise.
    if held:
        return wanted, Reason.HOLD
    return wanted, Reason.GROW if wanted > present else Reason.SHRINK


def _carried_out(
    goal: float, reason: Reason, plan: BatchPlan, growth: float, most: float, grid: PlanGrid, low: int, high: int
) -> tuple[BatchPlan, Reason]:
    """The plan that comes near to ``goal`` without turning back, passing the cap or leaving the limits; and why."""

    def nearest(size: float, low: float, high: float) -> BatchPlan:
        return grid.nearest(math.ceil(size), min_size=low, max_size=high, tolerance=ROUNDING_TOLERANCE)

    present = plan.global_batch_size
    least = present / growth
    if not low <= present <= high:  # a moving limit moves the plan, whatever the gradient says
        return nearest(min(max(goal, least), present * growth), low, high), Reason.AT_LIMIT
    if reason not in (Reason.GROW, Reason.SHRINK):
        return plan, reason
    uncapped = nearest(goal, low, high).global_batch_size
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
    return nearest(goal, *within), reason
