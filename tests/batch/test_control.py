"""The control: properties over random runs, each reason by a case of its own, and what the error bar promises.

A run here is what ``AdaptiveBatch`` does around ``decide``, without the training: each step that is due measures the
noise and signal it is given, at the plan it runs.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.properties import with_examples

from adabatch.batch.averages import Averages, ProbeWindow
from adabatch.batch.control import Control, ControlState, Decision, Limits, Reason, decide
from adabatch.batch.criteria import (
    AugmentedInnerProductTest,
    CoordinateNormTest,
    Criterion,
    InnerProductTest,
    NoiseScale,
    NormTest,
    Observation,
)
from adabatch.batch.estimates import Estimate, estimate
from adabatch.batch.moments import GradientMoments
from adabatch.batch.needs import Needs
from adabatch.batch.plan import BatchPlan, Duration, PlanGrid, Progress, examples, micro_batch_sizes, steps, tokens
from adabatch.batch.schedules import Constant, LinearRamp, Seesaw, Stage, Stages
from adabatch.lr.shapes import linear

Measured = Callable[[BatchPlan], GradientMoments]

# Follows every test in full at once; what a case adds to it is what the case is about.
PLAIN = Control(memory=1, confidence=0.5, hysteresis=0.0, growth=math.inf, pace=math.inf)


def measured(noise: float, signal: float) -> Measured:
    """What a step measures if noise and signal are these."""

    def at(plan: BatchPlan) -> GradientMoments:
        size = plan.global_batch_size
        return GradientMoments.from_noise(
            noise, signal, part_size=min(plan.micro_batch_size, size / 2), num_examples=size
        )

    return at


def broken(**changes: float) -> Measured:
    """A measurement with numbers replaced."""
    return lambda plan: measured(100.0, 1.0)(plan)._replace(**changes)  # type: ignore[arg-type]


def run(
    measurements: Sequence[Measured],
    criterion: Criterion,
    control: Control,
    *,
    limits: Limits,
    grid: PlanGrid,
    plan: BatchPlan | None = None,
    state: ControlState | None = None,
    progress: Progress | None = None,
) -> list[Decision]:
    """One decision a step, from a first plan at the lower limit."""
    progress = progress or Progress()
    state = state or ControlState()
    low, high = limits.at(progress)
    plan = plan or grid.nearest(low, min_size=low, max_size=high)
    decisions = []
    for measurement in measurements:
        moments = measurement(plan) if state.until_probe == 0 else None
        progress = progress.after(plan.global_batch_size)
        decision = decide(
            criterion,
            moments,
            control=control,
            limits=limits,
            grid=grid,
            plan=plan,
            progress=progress,
            state=state,
        )
        decisions.append(decision)
        plan, state = decision.plan, decision.state
    return decisions


def sizes_of(decisions: Sequence[Decision]) -> list[int]:
    return [decision.plan.global_batch_size for decision in decisions]


def runnable(grid: PlanGrid, largest: int) -> list[int]:
    """All global batch sizes that the grid can run, ascending, the slow way."""
    quanta = [micro * grid.dp_size for micro in grid.micro_sizes]
    counts = (range(grid.min_accumulation, largest // quantum + 1) for quantum in quanta)
    return sorted({quantum * count for quantum, each in zip(quanta, counts, strict=True) for count in each})


# --- random runs ----------------------------------------------------------------------------------------------------


@st.composite
def grids(draw: st.DrawFn) -> PlanGrid:
    smallest = draw(st.integers(1, 8))
    return PlanGrid(
        dp_size=draw(st.integers(1, 4)),
        micro_sizes=micro_batch_sizes(smallest, smallest * draw(st.integers(1, 16))),
        min_accumulation=2,
    )


@st.composite
def controls(draw: st.DrawFn) -> Control:
    memory = draw(st.sampled_from([1, 1.5, 3, 10, math.inf]))
    return Control(
        interval=draw(st.integers(1, 3)),
        memory=memory,
        memory_share=draw(st.sampled_from([0.0, 0.2, 1.0])),
        confidence=0.5 if memory == 1 else draw(st.sampled_from([0.5, 0.75, 0.9])),
        hysteresis=draw(st.sampled_from([0.0, 0.05, 0.1, 0.5])),
        hold=draw(st.integers(0, 4)),
        growth=draw(st.sampled_from([1.01, 1.1, 1.5, 2.0, 7.3, math.inf])),
        pace=draw(st.sampled_from([0.1, 0.5, math.inf])),
        monotone=draw(st.booleans()),
    )


@st.composite
def limits_of(draw: st.DrawFn, grid: PlanGrid) -> Limits:
    """Limits between which there is a plan."""
    able = runnable(grid, 3000)
    low = draw(st.sampled_from(able[:50]))
    high = draw(st.sampled_from([size for size in able if size >= low]))
    return Limits(low - draw(st.integers(0, min(3, low - 1))), high + draw(st.integers(0, 3)))


exponents = st.floats(0, 5)
good = st.builds(
    lambda noise, signal, up, along: measured(10**noise * (1 + up), 10 ** (signal - 2) + along),
    exponents,
    st.floats(0, 3),
    st.floats(-0.3, 0.3),
    st.floats(-0.5, 0.5),
)
bad = st.sampled_from(
    [
        broken(part_sq=math.nan),
        broken(grad_sq=math.inf),
        broken(part_sq=-math.inf),
        broken(num_parts=1),
        measured(-5.0, 1.0),
        measured(5.0, -50.0),
        measured(0.0, 0.0),
    ]
)
criteria = st.sampled_from([NormTest(0.3), NormTest(0.9), NormTest(0.3, population=500), NoiseScale(), NoiseScale(3)])


@st.composite
def scenarios(draw: st.DrawFn, measurements: st.SearchStrategy[Measured] | None = None) -> dict[str, Any]:
    grid = draw(grids())
    each = st.one_of(good, good, good, bad) if measurements is None else measurements
    return {
        "measurements": draw(st.lists(each, min_size=1, max_size=25)),
        "criterion": draw(criteria),
        "control": draw(controls()),
        "limits": draw(limits_of(grid)),
        "grid": grid,
    }


@given(scenarios())
def test_plans_can_be_run_and_stay_inside_the_limits(scenario: dict[str, Any]) -> None:
    grid, (low, high) = scenario["grid"], scenario["limits"].at(Progress())
    for decision in run(**scenario):
        plan = decision.plan
        assert low <= plan.global_batch_size <= high
        assert plan.micro_batch_size in grid.micro_sizes
        assert plan.dp_size == grid.dp_size
        assert plan.accumulation_steps >= grid.min_accumulation


@with_examples(150)
@given(scenarios())
def test_reasons_match_what_happened(scenario: dict[str, Any]) -> None:
    control, grid = scenario["control"], scenario["grid"]
    low, high = scenario["limits"].at(Progress())
    decisions = run(**scenario)
    plans = [grid.nearest(low, min_size=low, max_size=high), *(decision.plan for decision in decisions)]
    for before, decision in zip(plans, decisions, strict=False):
        present, size = before.global_batch_size, decision.plan.global_batch_size
        assert (size > present) == (decision.reason is Reason.GROW)
        assert (size < present) == (decision.reason is Reason.SHRINK)
        if size == present:
            assert decision.plan == before, "a batch that stays is put together as it was"
        if control.monotone:
            assert size >= present
        asked = decision.estimate
        if asked is not None and size != present:
            assert math.isfinite(asked.wanted) or asked.low > present
            assert (asked.wanted > present) == (size > present)
            band = 1 + control.hysteresis
            assert not (present <= asked.wanted * band and asked.wanted <= present * band), "inside the hysteresis"
            assert not asked.low < present < asked.high, "inside the error bar"


@with_examples(150)
@given(scenarios())
def test_a_change_is_no_larger_than_the_cap_or_one_quantum(scenario: dict[str, Any]) -> None:
    grid, growth = scenario["grid"], scenario["control"].growth
    low, high = scenario["limits"].at(Progress())
    able = runnable(grid, 3010)
    first = grid.nearest(low, min_size=low, max_size=high).global_batch_size
    for before, after in itertools.pairwise([first, *sizes_of(run(**scenario))]):
        if after > before:
            assert after <= max(before * growth * (1 + 1e-12), min(size for size in able if size > before))
        elif after < before:
            assert after >= min(before / growth * (1 - 1e-12), max(size for size in able if size < before))


@given(scenarios())
def test_no_change_follows_within_the_hold(scenario: dict[str, Any]) -> None:
    decisions = run(**scenario)
    low, high = scenario["limits"].at(Progress())
    sizes = [scenario["grid"].nearest(low, min_size=low, max_size=high).global_batch_size, *sizes_of(decisions)]
    changes = [step for step, (one, other) in enumerate(itertools.pairwise(sizes)) if one != other]
    assert all(later - earlier > scenario["control"].hold for earlier, later in itertools.pairwise(changes))


@given(scenarios())
def test_probes_come_at_the_interval(scenario: dict[str, Any]) -> None:
    interval = scenario["control"].interval
    for step, decision in enumerate(run(**scenario)):
        assert decision.state.until_probe == -(step + 1) % interval
        if step % interval:
            assert decision.reason is Reason.NOT_PROBED
            assert decision.estimate is None


def test_the_automatic_interval_grows_with_the_window_and_starts_again_at_a_jump() -> None:
    control = Control(interval=None)
    assert [control.interval_after(n) for n in (0, 499, 500, 749, 750, 2500, 10**6)] == [1, 1, 2, 2, 3, 10, 10]
    assert {replace(control, memory_share=0.0).interval_after(n) for n in (0, 10**6)} == {1}
    assert {Control(interval=4).interval_after(n) for n in (0, 10**6)} == {4}
    assert {Control.direct().interval_after(n) for n in (0, 10**6)} == {1}

    steady, higher = (GradientMoments.from_noise(noise, 1.0, part_size=8, num_examples=64) for noise in (100.0, 900.0))
    plan, state, probed = BatchPlan(micro_batch_size=8, accumulation_steps=8, dp_size=1), ControlState(), []
    for step in range(800):
        measured = state.until_probe == 0
        probed.append(measured)
        state = decide(
            NormTest(0.5),
            (steady if step < 700 else higher) if measured else None,
            control=control,
            limits=Limits(64, 64),
            grid=PlanGrid(dp_size=1, micro_sizes=(8,)),
            plan=plan,
            progress=Progress(examples=64 * (step + 1), steps=step + 1),
            state=state,
        ).state
        if step % 97 == 0:  # a resume in between changes nothing
            state = ControlState.from_state_dict(json.loads(json.dumps(state.state_dict())))
    assert all(probed[:500])
    assert sum(probed[500:700]) == 100
    assert state.window.num_probes < 500
    assert all(probed[-80:]), "after the jump every step is probed again"


@given(scenarios(), st.data())
def test_a_saved_state_decides_the_same(scenario: dict[str, Any], data: st.DataObject) -> None:
    measurements = scenario.pop("measurements")
    cut = data.draw(st.integers(0, len(measurements)))
    whole = run(measurements, **scenario)
    first = run(measurements[:cut], **scenario)
    state, plan, progress = ControlState(), None, Progress()
    if first:
        state, plan = first[-1].state, first[-1].plan
        low, high = scenario["limits"].at(progress)
        start = scenario["grid"].nearest(low, min_size=low, max_size=high).global_batch_size
        for size in [start, *sizes_of(first)[:-1]]:
            progress = progress.after(size)
    saved = json.loads(json.dumps(state.state_dict(), allow_nan=False))
    loaded = ControlState.from_state_dict(saved)
    assert loaded == state
    rest = run(measurements[cut:], **scenario, state=loaded, plan=plan, progress=progress)
    assert repr(first + rest) == repr(whole)  # repr: NaN is not equal to itself


def scaled(measurement: Measured, factor: float) -> Measured:
    return lambda plan: measurement(plan).scaled(factor)


@given(scenarios(), st.integers(-40, 40))
def test_scaling_all_gradients_changes_no_decision(scenario: dict[str, Any], exponent: int) -> None:
    """By a power of two, so that no number is rounded: every plan, reason and error bar is the same to the bit."""
    once = run(**scenario)
    scenario["measurements"] = [scaled(each, 2.0**exponent) for each in scenario["measurements"]]
    again = run(**scenario)
    assert [(d.plan, d.reason) for d in once] == [(d.plan, d.reason) for d in again]
    for one, other in zip(once, again, strict=True):
        if one.estimate is not None and one.estimate.wanted > 0:
            assert repr(one.estimate) == repr(other.estimate)


@given(scenarios(good), st.floats(1e-3, 1e3))
def test_scaling_by_any_factor_changes_estimates_by_rounding_alone(scenario: dict[str, Any], factor: float) -> None:
    # the plan is held, so that a decision on the edge cannot tear the two runs apart
    low, _ = scenario["limits"].at(Progress())
    held = {**scenario, "limits": Limits(low, scenario["grid"].nearest(low, min_size=low).global_batch_size)}
    once = run(**held)
    again = run(**{**held, "measurements": [scaled(each, factor) for each in held["measurements"]]})
    for one, other in zip(once, again, strict=True):
        if one.estimate is not None and math.isfinite(one.estimate.wanted):
            assert other.estimate is not None
            assert other.estimate.wanted == pytest.approx(one.estimate.wanted, rel=1e-6)


# --- what cannot be used holds, and leaves no trace -----------------------------------------------------------------

GRID = PlanGrid(dp_size=2, micro_sizes=(8, 16, 32))
WIDE = Limits(32, 4096)
PLAN = BatchPlan(micro_batch_size=8, accumulation_steps=4, dp_size=2)  # 64 examples


def one(
    measurement: Measured | None,
    *,
    criterion: Criterion | None = None,
    control: Control = PLAIN,
    limits: Limits = WIDE,
    grid: PlanGrid = GRID,
    plan: BatchPlan = PLAN,
    state: ControlState | None = None,
    progress: Progress | None = None,
) -> Decision:
    """A single decision."""
    return decide(
        criterion or NoiseScale(),
        None if measurement is None else measurement(plan),
        control=control,
        limits=limits,
        grid=grid,
        plan=plan,
        progress=progress or Progress(examples=64, steps=1),
        state=state or ControlState(),
    )


UNUSABLE = {
    "part NaN": broken(part_sq=math.nan),
    "part inf": broken(part_sq=math.inf),
    "gradient NaN": broken(grad_sq=math.nan),
    "gradient inf": broken(grad_sq=math.inf),
    "both inf": broken(part_sq=math.inf, grad_sq=math.inf),
    "noise overflows": broken(part_sq=1e308),
    "its square overflows": broken(part_sq=1e200),
    "noise along NaN": broken(noise_along=math.nan),
    "noise along inf": broken(noise_along=math.inf),
}


@pytest.mark.parametrize("measurement", UNUSABLE.values(), ids=UNUSABLE.keys())
@pytest.mark.parametrize("past", [0, 1, 5])
def test_what_is_not_finite_holds_and_leaves_no_trace(measurement: Measured, past: int) -> None:
    control = Control(monotone=False)
    before = run([measured(100.0 + k, 1.0) for k in range(past)], NoiseScale(), control, limits=WIDE, grid=GRID)
    state = before[-1].state if before else ControlState()
    plan = before[-1].plan if before else PLAN
    decision = one(measurement, control=control, state=state, plan=plan)
    assert decision.reason is Reason.NOT_FINITE
    assert decision.plan == plan
    assert decision.state.averages == state.averages
    assert json.dumps(decision.state.state_dict(), allow_nan=False)


@given(scenarios(good), st.data())
def test_a_step_that_is_not_finite_changes_nothing_after_it(scenario: dict[str, Any], data: st.DataObject) -> None:
    # Without a pace, as the step consumes examples.
    scenario["control"] = replace(scenario["control"], interval=1, hold=0, pace=math.inf)
    without = run(**scenario)
    where = data.draw(st.integers(0, len(without)))
    measurements = list(scenario["measurements"])
    measurements.insert(where, data.draw(st.sampled_from(list(UNUSABLE.values()))))
    decisions = run(**{**scenario, "measurements": measurements})
    del decisions[where]
    assert repr([replace_nothing(d) for d in decisions]) == repr([replace_nothing(d) for d in without])


def replace_nothing(decision: Decision) -> tuple[Any, ...]:
    return decision.plan, decision.reason, decision.estimate, decision.state.averages


def test_one_part_measures_nothing() -> None:
    """A last step of one micro-batch has no spread: the plan stands, as between probes, whatever was known before."""
    strong = ControlState(window=ProbeWindow.of(Averages().after(measured(5000.0, 1.0)(PLAN), 0.5)))
    alone = GradientMoments(part_sq=3.0, part_size=8, grad_sq=3.0, num_examples=8, num_parts=1)
    for state in (ControlState(), strong):
        decision = one(lambda _: alone, state=state)
        assert (decision.reason, decision.plan, decision.estimate) == (Reason.NOT_PROBED, PLAN, None)
        assert decision.state.averages == state.averages


@pytest.mark.parametrize("criterion", [NormTest(0.5), NoiseScale(), InnerProductTest(0.1)])
@pytest.mark.parametrize("micro", [1, 16])
def test_a_plan_of_one_part_can_be_decided_on(criterion: Criterion, micro: int) -> None:
    """Single examples have a spread in a single micro-batch too."""
    plan = BatchPlan(micro_batch_size=micro, accumulation_steps=1, dp_size=1)
    moments = GradientMoments.from_noise(500.0, 1.0, part_size=0.5, num_examples=micro, noise_along=50.0)
    grid = PlanGrid(dp_size=1, micro_sizes=(micro,))
    decision = one(lambda _: moments, criterion=criterion, plan=plan, grid=grid, limits=Limits(micro, 4096))
    assert decision.reason is Reason.GROW
    wanted = criterion.wanted(Observation(moments, Progress()))
    assert decision.estimate is not None
    assert decision.estimate.wanted == pytest.approx(wanted, rel=1e-9)


@given(st.floats(-1e3, 0), st.floats(-10, 1e3))
def test_noise_below_nothing_holds(noise: float, signal: float) -> None:
    decision = one(measured(noise, signal))
    assert (decision.plan, decision.reason) == (PLAN, Reason.NO_NOISE)


@given(st.floats(1, 1e3), st.floats(-1e3, -1e-3))
def test_signal_below_nothing_holds(noise: float, signal: float) -> None:
    decision = one(measured(noise, signal))
    assert (decision.plan, decision.reason) == (PLAN, Reason.NO_SIGNAL)


def test_negative_estimates_enter_the_averages() -> None:
    """They are unbiased as they are; cut at zero, the average would be too large."""
    decisions = run(
        [measured(100.0, -3.0), measured(-20.0, 7.0)], NoiseScale(), replace(PLAIN, memory=3), limits=WIDE, grid=GRID
    )
    averages = decisions[-1].state.averages
    assert averages.noise == pytest.approx((0.5 * 100 - 20) / 1.5, rel=1e-9)
    assert averages.signal == pytest.approx((0.5 * -3 + 7) / 1.5, rel=1e-9)


# --- each reason by a case ------------------------------------------------------------------------------------------


def known(noise: float, signal: float, *, spread: float = 0.0, probes: int = 20) -> ControlState:
    """A state after probes that alternate around noise and signal."""
    averages = Averages()
    for k in range(probes):
        averages = averages.after(measured(noise * (1 + spread * (-1) ** k), signal)(PLAN), Control().decay)
    return ControlState(window=ProbeWindow.of(averages))


REASONS: dict[Reason, Callable[[], Decision]] = {
    Reason.GROW: lambda: one(measured(500.0, 1.0)),
    Reason.SHRINK: lambda: one(measured(40.0, 1.0)),
    Reason.SCHEDULED: lambda: one(measured(500.0, 1.0), criterion=Constant(128)),
    Reason.AGREES: lambda: one(measured(66.0, 1.0)),
    Reason.NOT_PROBED: lambda: one(None),
    Reason.NOT_FINITE: lambda: one(broken(part_sq=math.nan)),
    Reason.NO_NOISE: lambda: one(measured(-1.0, 1.0)),
    Reason.NO_SIGNAL: lambda: one(measured(100.0, -1.0)),
    Reason.MONOTONE: lambda: one(measured(40.0, 1.0), control=replace(PLAIN, monotone=True)),
    Reason.HYSTERESIS: lambda: one(measured(70.0, 1.0), control=replace(PLAIN, hysteresis=0.1)),
    Reason.NOT_SIGNIFICANT: lambda: one(
        measured(150.0, 1.0), control=Control(hysteresis=0.0), state=known(80.0, 1.0, spread=0.9)
    ),
    Reason.HOLD: lambda: one(measured(500.0, 1.0), state=ControlState(hold=1)),
    Reason.WARM_UP: lambda: one(measured(500.0, 1.0), control=replace(PLAIN, hold_until=steps(2))),
    Reason.PACE: lambda: one(measured(500.0, 1.0), control=replace(PLAIN, pace=0.1)),
    Reason.AT_LIMIT: lambda: one(measured(500.0, 1.0), limits=Limits(32, 64)),
}


SAID_BY_THE_STEP = (Reason.WEIGHS_NOTHING, Reason.NOT_COMMITTED)


@pytest.mark.parametrize("reason", [each for each in Reason if each not in SAID_BY_THE_STEP])
def test_every_reason_has_its_case(reason: Reason) -> None:
    decision = REASONS[reason]()
    assert decision.reason is reason
    moves = reason in (Reason.GROW, Reason.SHRINK, Reason.SCHEDULED)
    assert (decision.plan != PLAN) == moves


def test_a_limit_between_two_plans_is_the_limit_that_is_named() -> None:
    """No more than 64 can be run below 79: it is the limit that stops the batch, and the journal says so."""
    coarse = PlanGrid(dp_size=2, micro_sizes=(8,))
    decision = one(measured(500.0, 1.0), limits=Limits(32, 79), grid=coarse)
    assert (decision.plan, decision.reason) == (PLAN, Reason.AT_LIMIT)
    decision = one(measured(10.0, 1.0), limits=Limits(49, 128), grid=coarse)
    assert (decision.plan, decision.reason) == (PLAN, Reason.AT_LIMIT)


def test_growth_never_rounds_downwards() -> None:
    """A larger micro-batch may cost an eighth of the size, but not turn growth into shrinking."""
    grid = PlanGrid(dp_size=1, micro_sizes=(2, 4, 8, 16, 32, 64))
    plan = BatchPlan(micro_batch_size=2, accumulation_steps=33, dp_size=1)  # 66 examples
    within = one(measured(73.0, 1.0), control=Control.direct(), grid=grid, plan=plan)  # 64 is near enough to 73
    assert (within.plan, within.reason) == (plan, Reason.AGREES)
    beyond = one(measured(74.0, 1.0), control=Control.direct(), grid=grid, plan=plan)
    assert (beyond.plan.global_batch_size, beyond.reason) == (80, Reason.GROW)


def test_rounding_does_not_pass_the_growth_cap() -> None:
    grid = PlanGrid(dp_size=1, micro_sizes=(4, 8, 16, 32, 64, 128))
    plan = BatchPlan(micro_batch_size=4, accumulation_steps=15, dp_size=1)  # 60 examples, so at most 120
    decision = one(measured(1e4, 1.0), control=replace(PLAIN, growth=2.0), grid=grid, plan=plan)
    assert 60 < decision.plan.global_batch_size <= 120


@pytest.mark.parametrize("growth", [1.01, 1.1, 1.3, 2.0])
def test_a_small_cap_does_not_stall(growth: float) -> None:
    """From one quantum, 10 % more is nothing that can be run; a quantum a step it is, until the cap exceeds one."""
    control = replace(PLAIN, growth=growth)
    grid = PlanGrid(dp_size=1, micro_sizes=(8, 16))
    decisions = run([measured(1e6, 1.0)] * 60, NoiseScale(), control, limits=Limits(8, 256), grid=grid)
    sizes = sizes_of(decisions)
    assert sizes[-1] == 256
    assert all(later > earlier for earlier, later in itertools.pairwise(sizes[: sizes.index(256) + 1]))
    assert sizes[:2] == [16, 32 if growth == 2 else 24]


def test_a_wish_near_the_present_size_agrees() -> None:
    grid = PlanGrid(dp_size=1, micro_sizes=(8,))
    plan = BatchPlan(micro_batch_size=8, accumulation_steps=8, dp_size=1)
    for wanted, reason in ((66.0, Reason.AGREES), (67.9, Reason.AGREES), (68.1, Reason.GROW)):
        assert one(measured(wanted, 1.0), grid=grid, plan=plan).reason is reason
    for wanted, reason in ((63.9, Reason.AGREES), (60.1, Reason.AGREES), (59.0, Reason.SHRINK)):
        assert one(measured(wanted, 1.0), grid=grid, plan=plan).reason is reason


@pytest.mark.parametrize("hysteresis", [0.05, 0.1, 0.5])
def test_the_hysteresis_is_the_ratio_below_which_nothing_moves(hysteresis: float) -> None:
    control = replace(PLAIN, hysteresis=hysteresis)
    grid = PlanGrid(dp_size=1, micro_sizes=(1,))
    plan = BatchPlan(micro_batch_size=1, accumulation_steps=1000, dp_size=1)
    for ratio, reason in ((1 + hysteresis, Reason.GROW), (1 / (1 + hysteresis), Reason.SHRINK)):
        inside, outside = 1000 * (ratio + (1 - ratio) * 0.02), 1000 * (ratio - (1 - ratio) * 0.02)
        assert one(measured(inside, 1.0), control=control, grid=grid, plan=plan).reason is Reason.HYSTERESIS
        assert one(measured(outside, 1.0), control=control, grid=grid, plan=plan).reason is reason


# --- hold, interval, growth: counted --------------------------------------------------------------------------------


@pytest.mark.parametrize("hold", [0, 1, 2, 5])
@pytest.mark.parametrize("interval", [1, 2, 3])
def test_hold_is_counted_in_steps(hold: int, interval: int) -> None:
    """After a change, ``hold`` steps in which no other follows; then the next probe may change the batch again."""
    control = replace(PLAIN, hold=hold, interval=interval, growth=2.0)
    decisions = run([measured(1e9, 1.0)] * 40, NoiseScale(), control, limits=Limits(32, 10**6), grid=GRID)
    sizes = [32, *sizes_of(decisions)]
    changes = [step for step, (before, after) in enumerate(itertools.pairwise(sizes)) if before != after]
    apart = interval * math.ceil((hold + 1) / interval)
    assert changes[:4] == [0, apart, 2 * apart, 3 * apart]
    for step, decision in enumerate(decisions[: 3 * apart]):
        if step % interval == 0 and step not in changes:
            assert decision.reason is Reason.HOLD


def test_growth_is_capped_either_way() -> None:
    up = run([measured(1e9, 1.0)] * 4, NoiseScale(), replace(PLAIN, growth=2.0), limits=WIDE, grid=GRID)
    assert sizes_of(up) == [64, 128, 256, 512]
    down = run(
        [measured(1.0, 1.0)] * 4, NoiseScale(), replace(PLAIN, growth=2.0), limits=WIDE, grid=GRID, plan=up[-1].plan
    )
    assert sizes_of(down) == [256, 128, 64, 32]


def test_direct_control_follows_every_test_in_full() -> None:
    """One test at eta 0.1 in pure noise multiplies the batch by a hundred, as in the papers."""
    control = Control.direct()
    (decision,) = run([measured(1e9, 0.0)], NormTest(0.1), control, limits=Limits(32, 10**6), grid=GRID)
    assert decision.plan.global_batch_size == 3200
    assert Control.direct(interval=5).interval == 5


@given(st.floats(0.3, 0.9), st.floats(300, 3000))
def test_the_norm_test_settles_where_theory_says(eta: float, noise: float) -> None:
    """With exact measurements the batch grows to ``B (1 - eta^2) / eta^2``, up to rounding and hysteresis."""
    settled = noise * (1 - eta**2) / eta**2
    assume(settled > 40)
    grid = PlanGrid(dp_size=1, micro_sizes=(1,), min_accumulation=2)
    decisions = run([measured(noise, 1.0)] * 60, NormTest(eta), Control.direct(), limits=Limits(2, 10**6), grid=grid)
    # each test asks for the next whole number, so the batch may stop a step below where asking ends
    assert decisions[-1].plan.global_batch_size == pytest.approx(settled, rel=0.02)


# --- hold in examples, pace and warm-up -----------------------------------------------------------------------------


def test_a_hold_in_examples_is_over_after_so_many() -> None:
    control = replace(PLAIN, hold=examples(1000), growth=2.0)
    decisions = run([measured(1e9, 1.0)] * 40, NoiseScale(), control, limits=Limits(32, 10**6), grid=GRID)
    sizes = [32, *sizes_of(decisions)]
    consumed = list(itertools.accumulate(sizes))
    changes = [consumed[k] for k, (before, after) in enumerate(itertools.pairwise(sizes)) if before != after]
    assert changes[0] == 32
    assert all(later - earlier >= 1000 for earlier, later in itertools.pairwise(changes))
    assert decisions[1].reason is Reason.HOLD
    assert sizes_of(
        run([measured(1e9, 1.0)] * 40, NoiseScale(), replace(control, hold=steps(3)), limits=WIDE, grid=GRID)
    ) == sizes_of(run([measured(1e9, 1.0)] * 40, NoiseScale(), replace(control, hold=3), limits=WIDE, grid=GRID))


@given(st.floats(0.01, 2.0), st.floats(1.2, 8.0))
def test_growth_is_at_most_its_share_of_the_examples_so_far(pace: float, growth: float) -> None:
    control = replace(PLAIN, pace=pace, growth=growth)
    decisions = run([measured(1e9, 1.0)] * 80, NoiseScale(), control, limits=Limits(32, 10**6), grid=GRID)
    sizes = [32, *sizes_of(decisions)]
    for consumed, (before, after) in zip(itertools.accumulate(sizes), itertools.pairwise(sizes), strict=False):
        assert after == before or after <= pace * consumed
    assert sizes[-1] > 32 or pace * 80 * 32 < 48
    assert {decision.reason for decision in decisions} <= {Reason.GROW, Reason.PACE, Reason.AT_LIMIT}


def test_late_in_a_run_the_pace_is_no_brake() -> None:
    control = Control(memory=1, confidence=0.5, hysteresis=0.0)
    late = Progress(examples=64 * 200, steps=200)
    decisions = run([measured(1e9, 1.0)] * 3, NoiseScale(), control, limits=WIDE, grid=GRID, plan=PLAN, progress=late)
    assert sizes_of(decisions) == [128, 256, 512]


@pytest.mark.parametrize("until", [examples(200), steps(3)])
def test_growth_waits_for_the_warm_up(until: Duration) -> None:
    """That of the caller where the control names none; shrinking does not wait, and limits move the plan."""
    options: dict[str, Any] = {"criterion": NoiseScale(), "limits": WIDE, "grid": GRID, "plan": PLAN}

    def reason(noise: float, control: Control, hold_until: Duration | None, progress: Progress) -> Reason:
        return decide(
            moments=measured(noise, 1.0)(PLAN),
            control=control,
            progress=progress,
            state=ControlState(),
            hold_until=hold_until,
            **options,
        ).reason

    early, late = Progress(examples=128, steps=2), Progress(examples=256, steps=4)
    assert reason(1e3, PLAIN, until, early) is Reason.WARM_UP
    assert reason(1e3, PLAIN, until, late) is Reason.GROW
    assert reason(1.0, PLAIN, until, early) is Reason.SHRINK
    assert reason(1e3, replace(PLAIN, hold_until=examples(0)), until, early) is Reason.GROW
    assert reason(1e3, replace(PLAIN, hold_until=until), examples(0), early) is Reason.WARM_UP
    assert reason(1e3, Control.direct(), until, early) is Reason.GROW


def test_a_step_that_was_not_finite_is_not_used() -> None:
    """Whatever it measured, and whether it was probed or not; a schedule goes on."""

    def decided(moments: GradientMoments | None, criterion: Criterion) -> Decision:
        return decide(
            criterion,
            moments,
            control=PLAIN,
            limits=WIDE,
            grid=GRID,
            plan=PLAN,
            progress=Progress(examples=64, steps=1),
            state=known(100.0, 1.0),
            finite=False,
        )

    for moments in (measured(1e3, 1.0)(PLAN), None):
        decision = decided(moments, NoiseScale())
        assert (decision.plan, decision.reason, decision.estimate) == (PLAN, Reason.NOT_FINITE, None)
        assert decision.state.window == known(100.0, 1.0).window
        assert decided(moments, Constant(128)).reason is Reason.SCHEDULED


# --- schedules ------------------------------------------------------------------------------------------------------


@given(grids(), st.integers(1, 900), st.integers(1, 900), st.integers(100, 20000), st.data())
def test_schedules_are_followed_exactly(grid: PlanGrid, first: int, last: int, over: int, data: st.DataObject) -> None:
    limits = data.draw(limits_of(grid))
    low, high = limits.at(Progress())
    ramp = LinearRamp(first, last, examples(over))
    progress, plan = Progress(), grid.nearest(low, min_size=low, max_size=high)
    for _ in range(20):
        (decision,) = run([broken()], ramp, Control(), limits=limits, grid=grid, plan=plan, progress=progress)
        progress = progress.after(plan.global_batch_size)
        wanted = ramp.size(progress)
        assert decision.reason is Reason.SCHEDULED
        assert decision.estimate == Estimate(wanted, wanted, wanted)
        plan = decision.plan
        reached = [size for size in runnable(grid, high) if low <= size <= high]
        distance = abs(plan.global_batch_size - min(max(wanted, low), high))
        assert distance <= min(abs(size - min(max(wanted, low), high)) for size in reached)


def test_stages_give_their_sizes_whatever_the_control_says() -> None:
    stages = Stages(64, [Stage(steps(2), 512), Stage(steps(3), 32)])
    cautious = Control(hold=9, growth=1.1)
    decisions = run([measured(1.0, 1.0)] * 5, stages, cautious, limits=WIDE, grid=GRID)
    assert sizes_of(decisions) == [64, 512, 32, 32, 32]


def test_a_schedule_at_its_infinite_end_runs_at_the_ceiling() -> None:
    seesaw = Seesaw(32, linear(), examples(100))
    decision = one(None, criterion=seesaw, progress=Progress(examples=200))
    assert (decision.plan.global_batch_size, decision.reason) == (4096, Reason.SCHEDULED)


def test_a_schedule_that_is_not_a_number_holds() -> None:
    class OfLoss:
        """A criterion of a loss that nobody measured."""

        needs = Needs()

        def wanted(self, observation: Observation) -> float:
            return math.nan if observation.loss is None else observation.loss

    decision = one(None, criterion=OfLoss())
    assert (decision.plan, decision.reason) == (PLAN, Reason.NOT_FINITE)


FLOOR = LinearRamp(32, 1000, examples(5000))


@given(grids(), controls(), st.lists(good, min_size=5, max_size=25), st.booleans())
def test_floors_and_ceilings_move_the_plan(
    grid: PlanGrid, control: Control, measurements: list[Measured], as_floor: bool
) -> None:
    """The floor yields only where nothing between it and the ceiling can be run; the ceiling never does."""
    able = runnable(grid, 6000)
    assume(able[0] <= 32)
    limits = Limits(FLOOR, 1000) if as_floor else Limits(1, LinearRamp(1000, 32, examples(5000)))
    progress, plan, state = Progress(), grid.nearest(32, max_size=1000), ControlState()
    for measurement in measurements:
        (decision,) = run(
            [measurement], NoiseScale(), control, limits=limits, grid=grid, plan=plan, state=state, progress=progress
        )
        progress = progress.after(plan.global_batch_size)
        low, high = limits.at(progress)
        below_ceiling = max(size for size in able if size <= high)
        plan, state = decision.plan, decision.state
        assert min(low, below_ceiling) <= plan.global_batch_size <= high


def test_a_floor_moves_the_plan_when_the_gradient_does_not() -> None:
    limits = Limits(FLOOR, 4096)
    decision = one(None, limits=limits, progress=Progress(examples=2500))
    assert decision.reason is Reason.AT_LIMIT
    assert 516 <= decision.plan.global_batch_size <= 516 * 9 / 8 + 16
    held = one(measured(1e6, 1.0), limits=limits, progress=Progress(examples=2500), state=ControlState(hold=5))
    assert held.plan.global_batch_size >= 516, "a hold does not keep a batch below its floor"


def test_a_floor_above_its_ceiling_yields() -> None:
    """Nothing of 16 examples a quantum lies between 993 and 1000: the largest below the ceiling is taken."""
    coarse = PlanGrid(dp_size=2, micro_sizes=(8,))
    for ceiling in (1000, 100):
        decision = one(None, limits=Limits(FLOOR, ceiling), grid=coarse, progress=Progress(examples=10**6))
        assert decision.plan.global_batch_size == ceiling // 16 * 16
        again = one(
            None,
            limits=Limits(FLOOR, ceiling),
            grid=coarse,
            plan=decision.plan,
            progress=Progress(examples=10**6),
        )
        assert (again.plan, again.reason) == (decision.plan, Reason.NOT_PROBED)


def test_a_floor_without_end_yields_to_the_ceiling() -> None:
    seesaw = Seesaw(32, linear(), examples(100))
    over = Progress(examples=200)
    assert Limits(seesaw, 512).at(over) == (512, 512)
    low, high = Limits(64, seesaw).at(over)
    assert low == 64
    assert isinstance(high, int)
    assert high > 10**15


def test_limits_of_schedules_are_rounded_inwards() -> None:
    limits = Limits(LinearRamp(10, 11, steps(2)), LinearRamp(20, 21, steps(2)))
    assert limits.at(Progress(steps=1)) == (11, 20)


# --- averages -------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.floats(-1e3, 1e6), st.floats(-1e3, 1e3), st.floats(-10, 1e3)), min_size=1, max_size=30),
    st.sampled_from([0.0, 0.3, 9 / 11, 1.0]),
)
def test_averages_by_direct_weights(probes: list[tuple[float, float, float]], decay: float) -> None:
    averages = Averages()
    for noise, signal, along in probes:
        averages = averages.after(
            GradientMoments.from_noise(noise, signal, part_size=1, num_examples=2)._replace(noise_along=along), decay
        )
    # what the moments say after their own rounding, so that only the recursion is compared
    made = [GradientMoments.from_noise(noise, signal, part_size=1, num_examples=2) for noise, signal, _ in probes]
    noises, signals = np.array([each.noise for each in made]), np.array([each.signal for each in made])
    weights = decay ** np.arange(len(probes) - 1, -1, -1.0)
    total = weights.sum()
    largest_noise, largest_signal = np.abs(noises).max(), np.abs(signals).max()
    mean_noise, mean_signal = weights @ noises / total, weights @ signals / total
    assert averages.weight == pytest.approx(total, rel=1e-12)
    assert averages.weight_sq == pytest.approx(weights @ weights, rel=1e-12)
    assert averages.num_effective == pytest.approx(total**2 / (weights @ weights), rel=1e-12)
    assert averages.noise == pytest.approx(mean_noise, abs=1e-12 * largest_noise)
    assert averages.signal == pytest.approx(mean_signal, abs=1e-12 * largest_signal)
    assert averages.noise_along == pytest.approx(weights @ [along for *_, along in probes] / total, abs=1e-9)
    d_noise, d_signal = noises - mean_noise, signals - mean_signal
    tolerance = 1e-12 * len(probes)
    assert averages.spread_noise == pytest.approx(weights @ d_noise**2, abs=tolerance * largest_noise**2)
    assert averages.spread_signal == pytest.approx(weights @ d_signal**2, abs=tolerance * largest_signal**2)
    assert averages.spread_both == pytest.approx(
        weights @ (d_noise * d_signal), abs=tolerance * largest_noise * largest_signal
    )


def test_another_norm_begins_new_averages() -> None:
    first, other = measured(300.0, 1.0)(PLAN), measured(7.0, 2.0)(PLAN)._replace(norm="adam")
    averages = Averages().after(first, 0.8).after(first, 0.8)
    assert averages.after(other, 0.8) == Averages(norm="adam").after(other, 0.8)
    assert averages.after(other, 0.8).moments(PLAN).norm == "adam"


def test_the_noise_at_the_quantile_is_averaged_like_the_noise() -> None:
    """It and the noise in one proportion: the coordinate-wise test then asks for so many times the norm test."""
    averages = Averages()
    for noise in (300.0, 330.0, 270.0, 310.0):
        moments = measured(noise, 1.0)(PLAN)
        averages = averages.after(moments._replace(noise_at_quantile=7 * noise), 9 / 11)
    options: dict[str, Any] = {"seen": Observation(None, Progress()), "confidence": 0.9, "plug_in": True}
    plain = estimate(NormTest(0.5), averages, PLAN, **options)
    found = estimate(CoordinateNormTest(0.5, quantile=0.9), averages, PLAN, **options)
    assert found[:3] == pytest.approx([7 * number for number in plain[:3]], rel=1e-9)


def test_a_coordinate_that_passes_at_no_batch_holds_the_plan() -> None:
    def endless(plan: BatchPlan) -> GradientMoments:
        return measured(100.0, 1.0)(plan)._replace(noise_at_quantile=math.inf)

    decision = one(endless, criterion=CoordinateNormTest(0.5, quantile=1.0))
    assert (decision.reason, decision.plan) == (Reason.NOT_FINITE, PLAN)


def test_the_memory_is_the_weight_of_so_many_probes() -> None:
    for memory in (1, 2, 10, 33.5):
        averages = Averages()
        for _ in range(600):
            averages = averages.after(measured(1.0, 1.0)(PLAN), Control(memory=memory, confidence=0.5).decay)
        assert averages.num_effective == pytest.approx(memory, rel=1e-9)


def test_an_infinite_memory_weighs_all_probes_alike() -> None:
    assert Control(memory=math.inf).decay == 1
    noises = [3.0, 5.0, 10.0]
    (*_, last) = run(
        [measured(noise, 1.0) for noise in noises], NoiseScale(), Control(memory=math.inf), limits=WIDE, grid=GRID
    )
    assert last.state.averages.noise == pytest.approx(6.0, rel=1e-9)
    assert last.state.averages.num_effective == pytest.approx(3, rel=1e-12)


def test_the_covariance_is_that_of_the_means() -> None:
    """Of equal weights: the sample covariance over the number of probes."""
    rng = np.random.default_rng(8)
    pairs = rng.standard_normal((12, 2)) * (5, 2) + (40, 3)
    averages = Averages()
    for noise, signal in pairs:
        averages = averages.after(measured(noise, signal)(PLAN), 1.0)
    expected = np.cov(pairs.T) / 12
    assert averages.covariance() == pytest.approx((expected[0, 0], expected[1, 1], expected[0, 1]), rel=1e-9)
    assert Averages().covariance()[0] == math.inf
    assert Averages().after(measured(1.0, 1.0)(PLAN), 0.5).covariance()[:2] == (math.inf, math.inf)


# --- the error bar --------------------------------------------------------------------------------------------------


def bar(state: ControlState, criterion: Criterion, confidence: float) -> Estimate:
    return estimate(criterion, state.averages, PLAN, seen=Observation(None, Progress()), confidence=confidence)


@pytest.mark.parametrize("criterion", [NormTest(0.5), NoiseScale(), NormTest(0.5, population=10**6)])
def test_the_bar_is_wider_for_more_confidence_and_more_spread(criterion: Criterion) -> None:
    widths = [
        [math.log(b.high / b.low) for b in (bar(known(300.0, 1.0, spread=s), criterion, c) for c in (0.6, 0.9, 0.99))]
        for s in (0.05, 0.2)
    ]
    for row in widths:
        assert 0 < row[0] < row[1] < row[2]
    for narrow, wide in zip(*widths, strict=True):
        assert narrow < wide


def test_the_bar_of_a_single_probe_has_no_end() -> None:
    found = bar(known(300.0, 1.0, probes=1), NoiseScale(), 0.9)
    assert (found.low, found.high) == (0, math.inf)
    assert found.wanted == pytest.approx(300, rel=1e-9)


def test_no_confidence_and_no_spread_need_no_bar() -> None:
    for found in (bar(known(300.0, 1.0, spread=0.3), NoiseScale(), 0.5), bar(known(300.0, 1.0), NoiseScale(), 0.9)):
        assert found.low == pytest.approx(found.wanted, rel=1e-6)
        assert found.high == pytest.approx(found.wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("confidence", "probes", "quantile"), [(0.75, 6, 0.7267), (0.9, 6, 1.4759), (0.9, 10, 1.3830), (0.95, 10, 1.8331)]
)
def test_the_bar_is_a_quantile_of_students_t(confidence: float, probes: int, quantile: float) -> None:
    """With noise alone uncertain, ``log(wanted)`` has its relative standard error; one freedom less than probes.

    Quantiles from a table; the expansion in the degrees of freedom is good to 0.2 % from five of them on.
    """
    averages = Averages()
    for k in range(probes):
        averages = averages.after(measured(300.0 + 10 * (-1) ** k, 1.0)(PLAN), 1.0)
    found = estimate(NoiseScale(), averages, PLAN, seen=Observation(None, Progress()), confidence=confidence)
    error = math.sqrt(100 * probes / (probes - 1) / probes) / 300
    assert math.log(found.high / found.wanted) == pytest.approx(quantile * error, rel=3e-3)
    assert math.log(found.wanted / found.low) == pytest.approx(quantile * error, rel=3e-3)


def test_the_noise_along_is_as_uncertain_as_the_noise() -> None:
    """For the inner-product test in a batch where signal dominates, so that the bar is that of the numerator."""
    averages = Averages()
    for k in range(10):
        moments = measured(3.0 + 0.1 * (-1) ** k, 1e6)(PLAN)
        averages = averages.after(moments._replace(noise_along=0.1 * moments.noise), 1.0)
    found = estimate(InnerProductTest(0.01), averages, PLAN, seen=Observation(None, Progress()), confidence=0.9)
    error = math.sqrt(0.01 / 9) / 3
    assert math.log(found.high / found.wanted) == pytest.approx(1.3830 * error, rel=3e-3)


def test_what_rises_and_falls_together_leaves_the_ratio_certain() -> None:
    """Noise and signal in one proportion, whatever their size: their covariance takes all of the bar away."""
    averages = Averages()
    for factor in (0.5, 1.5, 0.7, 1.3, 1.0, 2.0):
        averages = averages.after(measured(300.0 * factor, factor)(PLAN), 9 / 11)
    together = estimate(NoiseScale(), averages, PLAN, seen=Observation(None, Progress()), confidence=0.9)
    assert (together.low, together.high) == pytest.approx((300, 300), rel=1e-3)
    apart = replace(averages, spread_both=0.0)
    assert estimate(NoiseScale(), apart, PLAN, seen=Observation(None, Progress()), confidence=0.9).high > 400


@pytest.mark.parametrize("criterion", [InnerProductTest(0.9), AugmentedInnerProductTest(0.9, 5.0)])
def test_any_criterion_has_a_bar(criterion: Criterion) -> None:
    averages = Averages()
    for k in range(20):
        moments = measured(300.0 * (1 + 0.2 * (-1) ** k), 1.0)(PLAN)
        averages = averages.after(moments._replace(noise_along=0.1 * moments.noise), 9 / 11)
    found = estimate(criterion, averages, PLAN, seen=Observation(None, Progress()), confidence=0.9)
    assert 0 < found.low < found.wanted < found.high < math.inf


def probes_of(
    rng: np.random.Generator, *, trials: int, probes: int, plan: BatchPlan, d: int, noise: float, signal: float
) -> NDArray[np.float64]:
    """Squared norms of parts and of their mean for independent steps, shape (trials, probes, 2)."""
    shape = (trials, probes, plan.num_parts, d)
    parts = rng.standard_normal(shape) * math.sqrt(noise / d / plan.micro_batch_size)
    parts[..., 0] += math.sqrt(signal)
    return np.stack([(parts**2).sum(-1).mean(-1), (parts.mean(-2) ** 2).sum(-1)], axis=-1)


def averages_of(rows: NDArray[np.float64], plan: BatchPlan, decay: float) -> Averages:
    averages = Averages()
    for part_sq, grad_sq in rows:
        moments = GradientMoments(
            part_sq=float(part_sq),
            part_size=plan.micro_batch_size,
            grad_sq=float(grad_sq),
            num_examples=plan.global_batch_size,
            num_parts=plan.num_parts,
        )
        averages = averages.after(moments, decay)
    return averages


@pytest.mark.parametrize(("probes", "noise", "d"), [(20, 100.0, 30), (20, 1000.0, 30), (4, 300.0, 100)])
@pytest.mark.parametrize("confidence", [0.75, 0.9])
def test_the_bar_holds_the_true_size_as_often_as_it_says(probes: int, noise: float, d: int, confidence: float) -> None:
    """Each side alone, over independent runs: the binomial error of 600 runs is 0.012 at 0.9 and 0.018 at 0.75.

    Allowed are four of these, as the delta method and the effective number of probes are approximations.
    """
    rng = np.random.default_rng(11)
    trials, criterion, decay = 600, NormTest(0.5), Control().decay
    truth = criterion.rest(Observation(measured(noise, 1.0)(PLAN), Progress()))
    below = above = 0
    for rows in probes_of(rng, trials=trials, probes=probes, plan=PLAN, d=d, noise=noise, signal=1.0):
        found = estimate(
            criterion, averages_of(rows, PLAN, decay), PLAN, seen=Observation(None, Progress()), confidence=confidence
        )
        below += found.low <= truth
        above += truth <= found.high
    error = math.sqrt(confidence * (1 - confidence) / trials)
    assert below / trials == pytest.approx(confidence, abs=4 * error)
    assert above / trials == pytest.approx(confidence, abs=4 * error)


@pytest.mark.parametrize("noise", [1000.0, 5000.0])
@pytest.mark.parametrize("confidence", [0.75, 0.9])
def test_the_bar_is_high_enough_where_the_signal_is_lost_in_noise(noise: float, confidence: float) -> None:
    """The signal is a 15th and an 80th of the noise in the gradient. A size without end holds the true one, too."""
    rng = np.random.default_rng(11)
    trials, criterion, decay = 400, NoiseScale(), Control().decay
    above = 0
    for rows in probes_of(rng, trials=trials, probes=20, plan=PLAN, d=30, noise=noise, signal=1.0):
        found = estimate(
            criterion, averages_of(rows, PLAN, decay), PLAN, seen=Observation(None, Progress()), confidence=confidence
        )
        above += math.isinf(found.wanted) or noise <= found.high
    error = math.sqrt(confidence * (1 - confidence) / trials)
    assert above / trials == pytest.approx(confidence, abs=4 * error)


@pytest.mark.parametrize(
    ("confidence", "control"), [(0.9, Control(hysteresis=0.0, pace=math.inf)), (0.5, replace(PLAIN, memory=10))]
)
def test_growth_without_cause_is_as_rare_as_confidence_says(confidence: float, control: Control) -> None:
    """Where the true wish is the present size, a decision grows the batch with probability 1 - confidence, about."""
    rng = np.random.default_rng(12)
    trials, eta, grid = 500, 0.5, PlanGrid(dp_size=1, micro_sizes=(1,), min_accumulation=2)
    plan = BatchPlan(micro_batch_size=16, accumulation_steps=16, dp_size=1)  # 256 examples, so no rounding hides growth
    noise = 256 * eta**2 / (1 - eta**2)
    assert NormTest(eta).wanted(Observation(measured(noise, 1.0)(plan), Progress())) == pytest.approx(256)
    grown = 0
    for rows in probes_of(rng, trials=trials, probes=15, plan=plan, d=40, noise=noise, signal=1.0):
        state = ControlState(window=ProbeWindow.of(averages_of(rows[:-1], plan, control.decay)))
        last = GradientMoments(float(rows[-1, 0]), 16, float(rows[-1, 1]), 256, 16)
        decision = one(
            lambda _, last=last: last,  # type: ignore[misc]
            criterion=NormTest(eta),
            control=control,
            limits=Limits(2, 4096),
            grid=grid,
            plan=plan,
            state=state,
        )
        grown += decision.reason is Reason.GROW
    error = math.sqrt(confidence * (1 - confidence) / trials)
    assert grown / trials == pytest.approx(1 - confidence, abs=4 * error)


@with_examples(30)
@given(st.floats(2, 50))
def test_a_true_wish_is_followed_in_the_end(times: float) -> None:
    """An error bar must not hold back for ever: with probes enough, a batch well below its wish grows."""
    rng = np.random.default_rng(13)
    noise = 64 * times / 4 * 3
    plan, state = PLAN, ControlState()
    for rows in probes_of(rng, trials=1, probes=40, plan=PLAN, d=50, noise=noise, signal=1.0)[0]:
        moments = GradientMoments(float(rows[0]), 8, float(rows[1]), 64, 8)
        decision = one(
            lambda _, m=moments: m, criterion=NormTest(0.5), control=Control(pace=math.inf), plan=PLAN, state=state
        )  # type: ignore[misc]
        state = replace(decision.state, hold=0)
        if decision.reason is Reason.GROW:
            plan = decision.plan
    assert plan.global_batch_size > 64


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bad_value"),
    [
        ("interval", 0),
        ("interval", math.nan),
        ("memory", 0.5),
        ("memory", math.nan),
        ("confidence", 0.4),
        ("confidence", 1.0),
        ("confidence", math.nan),
        ("hysteresis", -0.1),
        ("hysteresis", math.inf),
        ("hysteresis", math.nan),
        ("hold", -1),
        ("hold", math.nan),
        ("growth", 1.0),
        ("growth", math.nan),
        ("memory_share", -0.1),
        ("memory_share", 1.5),
        ("memory_share", math.nan),
        ("shrink_confidence", 0.4),
        ("shrink_confidence", 1.0),
        ("shrink_confidence", math.nan),
        ("pace", 0.0),
        ("pace", math.nan),
    ],
)
def test_bad_controls_are_named(name: str, bad_value: float) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{name} must be .*got {bad_value}"):
        Control(**{name: bad_value})  # type: ignore[arg-type]


def test_bad_holds_are_named() -> None:
    with pytest.raises(ValueError, match="hold must be in examples or steps, got 5 tokens"):
        Control(hold=tokens(5))
    with pytest.raises(TypeError, match=r"hold_until must be a duration, such as .*, got 5"):
        Control(hold_until=5)  # type: ignore[arg-type]


def test_confidence_without_memory_is_refused() -> None:
    """One probe has no spread, so no change would ever be significant and the batch would never move."""
    with pytest.raises(ValueError, match=r"memory=1 .*confidence=0\.9"):
        Control(memory=1)
    with pytest.raises(ValueError, match="memory=1 "):
        Control(memory=1, confidence=0.5, shrink_confidence=0.9)
    assert Control(memory=1, confidence=0.5).decay == 0


def test_limits_may_be_integers_of_numpy() -> None:
    limits = Limits(np.int64(8), np.int32(64))  # type: ignore[arg-type]
    assert limits == Limits(8, 64)
    assert [type(limit) for limit in limits.at(Progress())] == [int, int]
    with pytest.raises(ValueError, match=r"limits\.min .*got 0"):
        Limits(np.int64(0), 8)  # type: ignore[arg-type]


def test_bad_limits_are_named() -> None:
    with pytest.raises(ValueError, match=r"limits\.min .*got 0"):
        Limits(0, 8)
    with pytest.raises(ValueError, match=r"limits\.max .*got -8"):
        Limits(8, -8)
    with pytest.raises(ValueError, match="min=16 is above max=8"):
        Limits(16, 8)
    for wrong in (64.0, math.nan, math.inf, "64", None):
        with pytest.raises(TypeError, match=rf"limits\.min must be .*schedule.*got {wrong!r}"):
            Limits(wrong, 128)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=rf"limits\.max must be .*schedule.*got {wrong!r}"):
            Limits(8, wrong)  # type: ignore[arg-type]
