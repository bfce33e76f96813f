"""The model of step times: recovered from steps that follow it, shared out where they do not tell, robust to pauses."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adabatch.batch.plan import BatchPlan
from adabatch.batch.step_times import PLANS, SAMPLES, StepTimeModel, StepTimes

MACHINE = StepTimeModel(overhead=2e-3, micro_batch=1e-3, example=5e-4, message=3e-4, gradient=8e-3)
SIZES, COUNTS, RANKS = (4, 8, 16, 32), (1, 2, 4), (1, 2, 4, 8)


def plan(micro: int, count: int = 1, ranks: int = 1) -> BatchPlan:
    return BatchPlan(micro_batch_size=micro, accumulation_steps=count, dp_size=ranks)


def timed(machine: StepTimeModel, *plans: BatchPlan) -> StepTimes:
    """What a machine that is exactly the model would show."""
    times = StepTimes()
    for each in plans:
        times = times.after(each, seconds(machine, each))
    return times


def seconds(machine: StepTimeModel, each: BatchPlan) -> float:
    return machine.seconds(each.micro_batch_size, each.accumulation_steps, each.dp_size)


def test_the_formula_by_hand() -> None:
    """Four ranks: six messages, and one and a half times the gradient."""
    expected = 2e-3 + 2 * (1e-3 + 8 * 5e-4) + 6 * 3e-4 + 1.5 * 8e-3
    assert seconds(MACHINE, plan(8, 2, 4)) == pytest.approx(expected, rel=1e-14)
    assert seconds(MACHINE, plan(8, 2)) == pytest.approx(2e-3 + 2 * (1e-3 + 8 * 5e-4), rel=1e-14), "alone sends nothing"


def test_a_machine_that_is_the_model_is_found_again() -> None:
    """From runs of several world sizes all five are known; what was not timed is predicted."""
    seen = [
        plan(m, k, p) for m, k, p in ((4, 1, 1), (32, 1, 1), (8, 4, 1), (8, 1, 2), (8, 2, 4), (16, 1, 8), (4, 1, 8))
    ]
    found = timed(MACHINE, *seen).model
    assert found == pytest.approx(MACHINE, rel=1e-6)


@given(
    st.sampled_from(RANKS),
    st.lists(st.tuples(st.sampled_from(SIZES), st.sampled_from(COUNTS)), min_size=4, max_size=12, unique=True),
    st.tuples(*[st.floats(1e-4, 1e-2)] * 5),
)
def test_one_world_size_predicts_its_own_plans(
    ranks: int, seen: list[tuple[int, int]], costs: tuple[float, float, float, float, float]
) -> None:
    """The three constants of a step cannot be told apart there, and their sum is what matters."""
    machine = StepTimeModel(*costs)
    if np.linalg.matrix_rank([[1, k, k * m] for m, k in seen]) < 3:
        return
    model = timed(machine, *(plan(m, k, ranks) for m, k in seen)).model
    for m, k in seen:
        assert seconds(model, plan(m, k, ranks)) == pytest.approx(seconds(machine, plan(m, k, ranks)), rel=0.05)
    assert min(model) >= 0


@given(st.lists(st.tuples(st.sampled_from(SIZES), st.sampled_from(COUNTS), st.floats(1e-3, 1)), min_size=1, max_size=9))
def test_no_time_is_ever_negative(rows: list[tuple[int, int, float]]) -> None:
    """Whatever was timed, as where a larger batch happened to be faster."""
    times = StepTimes()
    for m, k, took in rows:
        times = times.after(plan(m, k, 2), took)
    assert min(times.model) >= 0
    assert seconds(times.model, plan(8, 1, 2)) > 0


def test_one_plan_shares_its_time_out_between_the_causes() -> None:
    """Step, micro-batch and example; with other ranks two more for the reduction. It is a trial that tells."""
    alone = timed(MACHINE, plan(8)).model
    took = seconds(MACHINE, plan(8))
    assert alone == pytest.approx((took / 3, took / 3, took / 24, 0, 0), rel=1e-9)
    assert seconds(alone, plan(16)) == pytest.approx(took * 4 / 3, rel=1e-9)
    together = timed(MACHINE, plan(8, 1, 2)).model
    assert together.step(2) == pytest.approx(3 / 5 * seconds(MACHINE, plan(8, 1, 2)), rel=1e-9)


def test_two_plans_tell_a_busy_machine_from_an_idle_one() -> None:
    busy = StepTimeModel(0.0, 0.0, 1e-3, 0.0, 0.0)
    idle = StepTimeModel(1e-2, 0.0, 0.0, 0.0, 0.0)
    assert seconds(timed(busy, plan(8), plan(16)).model, plan(32)) == pytest.approx(32e-3, rel=1e-6)
    assert seconds(timed(idle, plan(8), plan(16)).model, plan(32)) == pytest.approx(1e-2, rel=1e-6)


def test_a_pause_does_not_count() -> None:
    """One step in five with a checkpoint in it, and one with a whole evaluation."""
    times = timed(MACHINE, plan(16))
    for index in range(12):
        pause = {4: 30.0, 9: 300.0}.get(index, 0.0)
        times = times.after(plan(8), seconds(MACHINE, plan(8)) + pause)
    assert seconds(times.model, plan(8)) == pytest.approx(seconds(MACHINE, plan(8)), rel=1e-6)


def test_a_machine_that_became_slower_is_followed() -> None:
    times = timed(MACHINE, *[plan(8)] * 9)
    for _ in range(SAMPLES):
        times = times.after(plan(8), 1.0)
    assert seconds(times.model, plan(8)) == pytest.approx(1.0)


def test_it_stays_small_and_is_plain_numbers() -> None:
    times = StepTimes()
    for index in range(200):
        times = times.after(plan(8, 1 + index % 40, 2), 0.1 + index)
    assert len(times.of) == PLANS
    assert all(len(each.seconds) <= SAMPLES for each in times.of)
    assert times.sizes == {16 * count for count in range(25, 41)}
    text = json.dumps(times.state_dict())
    assert StepTimes.from_state_dict(json.loads(text)) == times
    assert len(text) < 3000


def test_nothing_timed_is_no_model() -> None:
    assert StepTimes().sizes == frozenset()
    with pytest.raises(ValueError, match="needs a timed step"):
        _ = StepTimes().model
