"""Goodput against a search over every batch that can be run, and the control that follows it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adabatch import Goodput
from adabatch.batch.control import Control, ControlState, Limits, Reason, decide
from adabatch.batch.criteria import Criterion, Observation
from adabatch.batch.efficiency import efficiency
from adabatch.batch.goodput import REACH
from adabatch.batch.moments import GradientMoments
from adabatch.batch.needs import Needs
from adabatch.batch.plan import BatchPlan, PlanGrid, Progress, micro_batch_sizes
from adabatch.batch.step_times import StepTimeModel, StepTimes

GRID = PlanGrid(dp_size=2, micro_sizes=micro_batch_sizes(8, 64))
costs = st.floats(1e-5, 1e-2)
machines = st.builds(StepTimeModel, costs, costs, costs, st.just(0.0), st.just(0.0))
scales = st.floats(1, 1e5)


def seconds(machine: StepTimeModel, plan: BatchPlan) -> float:
    return machine.seconds(plan.micro_batch_size, plan.accumulation_steps, plan.dp_size)


def timed(machine: StepTimeModel, sizes: range | list[int], grid: PlanGrid = GRID) -> StepTimes:
    times = StepTimes()
    for size in sizes:
        plan = grid.nearest(size)
        times = times.after(plan, seconds(machine, plan))
    return times


def seen(scale: float, present: float, times: StepTimes | None, grid: PlanGrid | None = GRID) -> Observation:
    moments = GradientMoments.from_noise(scale, 1.0, part_size=1.0, num_examples=present)
    return Observation(moments, Progress(), times=times, grid=grid)


def value(machine: StepTimeModel, size: float, scale: float) -> float:
    """Goodput of any size on two ranks, whose micro-batch grows from 8 to 64 before there are more."""
    micro = min(max(size / 2, 8), 64)
    return size / machine.seconds(micro, size / 2 / micro, 2) / (scale + size)


# --- what it asks for -----------------------------------------------------------------------------------------------


@given(machines, scales)
def test_it_asks_for_the_best_of_all_batches_that_can_be_run(machine: StepTimeModel, scale: float) -> None:
    """Before rounding, and no further than is known."""
    times = timed(machine, [16, 32, 64, 128, 256, 512, 1024])
    wanted = Goodput(min_speedup=0).wanted(seen(scale, 16, times))
    best = max(value(machine, float(size), scale) for size in np.geomspace(16, REACH * 1024, 3000))
    assert 16 <= wanted <= REACH * 1024
    assert value(machine, wanted, scale) > 0.999 * best


@given(machines, scales, st.floats(0, 0.5), st.sampled_from([16, 64, 256, 1024]))
def test_the_present_batch_stands_where_little_is_to_be_gained(
    machine: StepTimeModel, scale: float, speedup: float, present: int
) -> None:
    times = timed(machine, [16, 64, 256, 1024])
    best = Goodput(min_speedup=0).wanted(seen(scale, present, times))
    wanted = Goodput(min_speedup=speedup).wanted(seen(scale, present, times))
    assert wanted in (best, present)
    gain = value(machine, best, scale) / value(machine, present, scale)
    assert gain > (1 + speedup) * 0.99 if wanted != present else gain < (1 + speedup) * 1.01


@given(machines, scales, st.floats(1.1, 100))
def test_more_noise_never_asks_for_a_smaller_batch(machine: StepTimeModel, scale: float, more: float) -> None:
    times = timed(machine, [16, 64, 256, 1024])
    asked = [Goodput(min_speedup=0).wanted(seen(each, 16, times)) for each in (scale, scale * more)]
    assert asked[0] <= asked[1] * (1 + 1e-9)


@given(machines, scales, st.floats(1e-6, 1e6), st.floats(1e-3, 1e3))
def test_neither_the_scale_of_gradients_nor_the_unit_of_time_matters(
    machine: StepTimeModel, scale: float, times_gradient: float, unit: float
) -> None:
    observation = seen(scale, 16, timed(machine, [16, 64, 256]))
    assert observation.moments is not None
    rescaled = observation._replace(moments=observation.moments.scaled(times_gradient))
    slower = StepTimeModel(*(cost * unit for cost in machine))
    expected = Goodput().wanted(observation)
    assert Goodput().wanted(rescaled) == pytest.approx(expected, rel=1e-6)
    assert Goodput().wanted(observation._replace(times=timed(slower, [16, 64, 256]))) == pytest.approx(
        expected, rel=1e-6
    )


def test_the_closed_form_by_hand() -> None:
    """A step of 40 ms beside 10 ms an example, noise scale 1600, one micro-batch size: sqrt(1600 * 4) = 80."""
    grid = PlanGrid(dp_size=1, micro_sizes=(10,))
    machine = StepTimeModel(0.04, 0.0, 0.01, 0.0, 0.0)
    assert Goodput().wanted(seen(1600, 10, timed(machine, [10, 20, 40], grid), grid)) == pytest.approx(80, rel=1e-6)
    busy = StepTimeModel(0.0, 0.0, 0.01, 0.0, 0.0)
    assert Goodput().wanted(seen(100, 40, timed(busy, [10, 20, 40], grid), grid)) == 10, "nothing to be saved"
    idle = StepTimeModel(0.04, 0.0, 0.0, 0.0, 0.0)
    assert Goodput().wanted(seen(1600, 10, timed(idle, [10, 20, 40], grid), grid)) == REACH * 40, "as far as it knows"


def test_what_is_not_known_is_named_not_raised() -> None:
    times = timed(StepTimeModel(1e-3, 0, 1e-3, 0, 0), [16, 32])
    assert Goodput().wanted(seen(100, 16, StepTimes())) == 16, "a batch stands until it is timed"
    assert Goodput().wanted(seen(1e9, 64, times)) == 64
    assert math.isnan(Goodput().wanted(seen(100, 16, None)))
    assert math.isnan(Goodput().wanted(seen(100, 16, times, None)))
    assert math.isnan(Goodput().wanted(Observation(None, Progress(), times=times, grid=GRID)))
    without = Observation(GradientMoments(2.0, 8, 0.5, 16, 2), Progress(), times=times, grid=GRID)
    assert without.moments is not None
    assert without.moments.signal <= 0
    assert Goodput().wanted(without) == math.inf
    no_noise = GradientMoments.from_noise(0.0, 1.0, part_size=1, num_examples=16)
    assert Goodput().wanted(without._replace(moments=no_noise)) == 0
    assert Goodput().wanted(without._replace(moments=no_noise, times=StepTimes())) == 0


@pytest.mark.parametrize("signal", [0.0, 1.0])
@pytest.mark.parametrize("is_timed", [False, True])
def test_without_noise_the_plan_stands(signal: float, is_timed: bool) -> None:
    """Micro-batches that are all the same, or a gradient of zero: the reason is said, and nothing divides by it."""
    plan, state = GRID.nearest(16), ControlState()
    for step in range(12):
        decision = decide(
            Goodput(),
            GradientMoments(signal, 8, signal, 16, 2),
            control=Control(),
            limits=Limits(16, 4096),
            grid=GRID,
            plan=plan,
            progress=Progress(examples=16 * (step + 1), steps=step + 1),
            state=state,
            timed=(plan, 0.1) if is_timed else None,
        )
        assert (decision.plan, decision.reason) == (plan, Reason.NO_NOISE)
        state = decision.state


def test_a_pause_moves_nothing() -> None:
    """One step in five may take as long as it likes: the median counts."""
    machine = StepTimeModel(5e-3, 1e-3, 1e-4, 1e-3, 4e-3)
    calm, shaken = StepTimes(), StepTimes()
    for size in (16, 32, 64, 128):
        plan = GRID.nearest(size)
        for sample in range(5):
            calm = calm.after(plan, seconds(machine, plan))
            shaken = shaken.after(plan, seconds(machine, plan) * (1000 if sample == 2 else 1))
    assert Goodput().wanted(seen(2000, 64, shaken)) == Goodput().wanted(seen(2000, 64, calm))


def test_it_says_what_it_needs_and_refuses_what_makes_no_sense() -> None:
    assert isinstance(Goodput(), Criterion)
    assert Goodput().needs == Needs(noise="euclidean", seconds=True)
    assert Goodput(norm="adam").needs == Needs(noise="adam", seconds=True)
    for bad in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"min_speedup must be zero or positive, .* got {bad}"):
            Goodput(min_speedup=bad)
    with pytest.raises(ValueError, match=r"norm must be one of euclidean, .*, got 'l3'"):
        Goodput(norm="l3")  # type: ignore[arg-type]


@given(st.floats(1, 1e4), st.floats(1, 1e4), st.floats(1, 1e4))
def test_efficiency_is_one_at_the_reference_and_falls(size: float, scale: float, reference: float) -> None:
    assert efficiency(reference, scale, reference=reference) == 1
    assert efficiency(2 * size, scale, reference=reference) < efficiency(size, scale, reference=reference)


# --- the control that follows it --------------------------------------------------------------------------------------


def drive(machine: StepTimeModel, scale: float, *, num_steps: int = 40, **control: bool) -> list[tuple[int, Reason]]:
    """A run on a machine that is the model, with measurements as expected; times come one step late."""
    plan, state, pending = GRID.nearest(16), ControlState(), None
    shown = []
    for step in range(num_steps):
        size = plan.global_batch_size
        decision = decide(
            Goodput(),
            GradientMoments.from_noise(scale, 1.0, part_size=8, num_examples=size),
            control=Control(memory=1, confidence=0.5, pace=math.inf, **control),
            limits=Limits(16, 4096),
            grid=GRID,
            plan=plan,
            progress=Progress(examples=size, steps=step + 1),
            state=state,
            loss=1.0,
            timed=pending,
        )
        pending = plan, seconds(machine, plan)
        plan, state = decision.plan, decision.state
        shown.append((plan.global_batch_size, decision.reason))
    return shown


def test_it_grows_to_where_the_larger_batch_is_no_faster_and_stays() -> None:
    machine, scale = StepTimeModel(5e-3, 1e-3, 1e-4, 1e-3, 4e-3), 2000.0
    sizes = [size for size, _ in drive(machine, scale)]
    assert sizes[0] == 16, "nothing is timed yet"
    assert sizes == sorted(sizes)
    assert len(set(sizes[15:])) == 1
    best = max(value(machine, size, scale) for size in range(16, 4097, 16))
    assert value(machine, sizes[-1], scale) > best / 1.06


def test_a_busy_machine_keeps_the_small_batch_after_one_trial() -> None:
    machine = StepTimeModel(1e-6, 0.0, 1e-3, 0.0, 0.0)
    trial = drive(machine, 100.0)
    assert {size for size, _ in trial} == {16, 32}
    assert [size for size, _ in trial[-20:]] == [16] * 20, "it is left again"
    standing = drive(machine, 100.0, monotone=True)
    assert {size for size, _ in standing[-20:]} == {32}, "and stands where the batch may only grow"
    assert standing[-1][1] == Reason.MONOTONE


def test_without_a_time_the_plan_is_held() -> None:
    decision = decide(
        Goodput(),
        GradientMoments.from_noise(500.0, 1.0, part_size=8, num_examples=16),
        control=Control(),
        limits=Limits(16, 4096),
        grid=GRID,
        plan=GRID.nearest(16),
        progress=Progress(examples=16, steps=1),
        state=ControlState(),
    )
    assert decision.plan == GRID.nearest(16)
    assert decision.reason == Reason.HYSTERESIS


def test_criteria_are_handed_loss_and_seconds() -> None:
    class Curious:
        needs = Needs(noise="euclidean", seconds=True)
        seen: Observation

        def wanted(self, observation: Observation) -> float:
            Curious.seen = observation
            return 16.0

    plan = GRID.nearest(16)
    decision = decide(
        Curious(),
        GradientMoments.from_noise(500.0, 1.0, part_size=8, num_examples=16),
        control=Control(),
        limits=Limits(16, 4096),
        grid=GRID,
        plan=plan,
        progress=Progress(examples=16, steps=1),
        state=ControlState(),
        loss=0.25,
        timed=(plan, 0.5),
    )
    assert (Curious.seen.loss, Curious.seen.seconds, Curious.seen.grid) == (0.25, 0.5, GRID)
    assert Curious.seen.times == decision.state.times == StepTimes().after(plan, 0.5)
    assert ControlState.from_state_dict(decision.state.state_dict()) == decision.state
