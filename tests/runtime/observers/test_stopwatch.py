"""Steps timed from one measured step to the next, against a clock that the test moves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from adabatch.batch.plan import BatchPlan
from adabatch.runtime.observers.protocol import Moment, Phase
from adabatch.runtime.observers.stopwatch import Stopwatch

SMALL = BatchPlan(micro_batch_size=4, accumulation_steps=1, dp_size=2)
LARGE = BatchPlan(micro_batch_size=4, accumulation_steps=2, dp_size=2)
HOST = torch.device("cpu")


class Time:
    """The host's clock."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    clock = Time()
    monkeypatch.setattr("adabatch.runtime.observers.stopwatch.perf_counter", clock)
    return clock


def ran(watch: Stopwatch, plan: BatchPlan, *, whole: bool = True) -> None:
    """The micro-batches of a step are run."""
    num_examples = plan.global_batch_size - (not whole)
    watch.at(Phase.MEASURING, Moment(0, plan, num_examples=num_examples))


def measured(*watches: Stopwatch) -> None:
    """A reduction over ranks."""
    total = float(sum(watch.outgoing(HOST) for watch in watches))
    for watch in watches:
        watch.incoming([total])


def run(time: Time, watch: Stopwatch, plans: list[BatchPlan], *, took: Callable[[BatchPlan], float]) -> list[object]:
    """Measured steps of one rank; what is known after each."""
    known = []
    for plan in plans:
        time.now += took(plan)
        ran(watch, plan)
        measured(watch)
        known.append(watch.timed)
    return known


def test_a_step_is_known_one_measured_step_late_and_the_first_of_a_plan_is_not_timed(time: Time) -> None:
    watch = Stopwatch(1)
    known = run(time, watch, [SMALL] * 4 + [LARGE] * 4, took=lambda plan: plan.global_batch_size / 8)
    assert known == [None, None, (SMALL, 1.0), (SMALL, 1.0), (SMALL, 1.0), None, (LARGE, 2.0), (LARGE, 2.0)]


def test_steps_between_measured_ones_share_the_span(time: Time) -> None:
    watch = Stopwatch(1)
    for _ in range(3):
        for _ in range(4):
            time.now += 0.5
            ran(watch, SMALL)
        measured(watch)
    assert watch.timed == (SMALL, 0.5)


@pytest.mark.parametrize("other", [(LARGE, True), (SMALL, False)], ids=["of another plan", "that is cut short"])
def test_a_span_with_a_step(time: Time, other: tuple[BatchPlan, bool]) -> None:
    """It says nothing, nor does the one after it where the plan has to come back first."""
    watch = Stopwatch(1)
    run(time, watch, [SMALL] * 3, took=lambda _: 1.0)
    for plan, whole in ((SMALL, True), other, (SMALL, True)):
        time.now += 1.0
        ran(watch, plan, whole=whole)
    measured(watch)
    assert watch.timed == (SMALL, 1.0), "of the span before"
    assert run(time, watch, [SMALL] * 2, took=lambda _: 2.0) == [None, (SMALL, 2.0)]


def test_all_ranks_know_the_mean_of_what_they_found(time: Time) -> None:
    slow, fast = Stopwatch(2), Stopwatch(2)
    for step in range(3):
        for watch in (slow, fast):
            ran(watch, LARGE)
        total = float(sum(watch.outgoing(HOST) for watch in (slow, fast)))
        for watch, seconds in ((slow, 3.0), (fast, 1.0)):
            time.now = 100 + seconds * step
            watch.incoming([total])
        assert slow.timed == fast.timed == (None if step < 2 else (LARGE, 2.0))


def test_a_rank_that_found_nothing_leaves_all_without_a_time(time: Time) -> None:
    old, new = Stopwatch(2), Stopwatch(2)
    run(time, old, [SMALL] * 3, took=lambda _: 1.0)
    time.now += 1.0
    for watch in (old, new):
        ran(watch, SMALL)
    measured(old, new)
    assert old.timed is None
    assert new.timed is None


def test_a_span_with_something_else_in_it_is_not_timed(time: Time) -> None:
    watch = Stopwatch(1)
    seconds = []
    for interrupted in (False, False, True, False):
        time.now += 2.0
        if interrupted:
            watch.at(Phase.TRIAL, Moment(0, SMALL))
        ran(watch, SMALL)
        measured(watch)
        seconds.append(None if watch.timed is None else watch.timed[1])
    assert seconds == [None, None, 2.0, None]


def test_a_span_with_an_evaluation_in_it_is_not_timed(time: Time) -> None:
    watch = Stopwatch(1)
    assert run(time, watch, [SMALL] * 4, took=lambda plan: 1.0)[-1] == (SMALL, 1.0)
    time.now += 50.0
    watch.interrupted()
    assert run(time, watch, [SMALL] * 3, took=lambda plan: 1.0) == [(SMALL, 1.0), None, (SMALL, 1.0)]
