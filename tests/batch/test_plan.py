"""Plans, durations and progress; the nearest plan against a list of all plans."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support.properties import with_examples

from adabatch.batch.plan import (
    BatchPlan,
    Duration,
    PlanGrid,
    Progress,
    examples,
    micro_batch_sizes,
    steps,
    tokens,
)


def all_plans(grid: PlanGrid, min_size: float, max_size: float) -> list[BatchPlan]:
    """Every plan inside the limits, the slow way."""
    return [
        BatchPlan(micro_batch_size=micro, accumulation_steps=count, dp_size=grid.dp_size)
        for micro in grid.micro_sizes
        for count in range(grid.min_accumulation, int(max_size) // (micro * grid.dp_size) + 1)
        if micro * count * grid.dp_size >= min_size
    ]


@st.composite
def grids(draw: st.DrawFn) -> PlanGrid:
    smallest = draw(st.integers(1, 12))
    largest = draw(st.integers(smallest, 100))
    return PlanGrid(
        dp_size=draw(st.integers(1, 6)),
        micro_sizes=micro_batch_sizes(smallest, largest),
        min_accumulation=draw(st.integers(1, 3)),
    )


limits = st.tuples(st.integers(1, 600), st.integers(0, 600)).map(lambda pair: (pair[0], sum(pair)))
sizes = st.one_of(st.floats(0.5, 2000), st.integers(1, 1200).map(float))


@with_examples(150)
@given(grids(), sizes, limits, st.sampled_from([0.0, 1 / 8, 0.5]))
def test_nearest_by_brute_force(grid: PlanGrid, wanted: float, limit: tuple[int, int], tolerance: float) -> None:
    low, high = limit
    plans = all_plans(grid, low, high)
    if not plans:
        with pytest.raises(ValueError, match=f"between {low} and {high}"):
            grid.nearest(wanted, min_size=low, max_size=high, tolerance=tolerance)
        return
    plan = grid.nearest(wanted, min_size=low, max_size=high, tolerance=tolerance)
    assert plan in plans
    goal = min(max(wanted, low), high)

    def error(each: BatchPlan) -> float:
        return abs(each.global_batch_size - goal) / goal

    least = min(map(error, plans))
    near = [each for each in plans if error(each) <= max(tolerance, least)]
    assert error(plan) <= max(tolerance, least)
    assert plan.micro_batch_size == max(each.micro_batch_size for each in near)
    same_micro = [each for each in plans if each.micro_batch_size == plan.micro_batch_size]
    assert error(plan) == min(map(error, same_micro))


@given(grids(), sizes)
def test_without_tolerance_nothing_is_nearer(grid: PlanGrid, wanted: float) -> None:
    plan = grid.nearest(wanted)
    distance = abs(plan.global_batch_size - wanted)
    assert all(distance <= abs(each.global_batch_size - wanted) for each in all_plans(grid, 1, 2 * wanted + 2000))


@given(grids(), st.integers(1, 10**9))
def test_a_plan_is_its_own_nearest(grid: PlanGrid, count: int) -> None:
    micro = grid.micro_sizes[-1]
    plan = BatchPlan(micro_batch_size=micro, accumulation_steps=max(count, grid.min_accumulation), dp_size=grid.dp_size)
    assert grid.nearest(plan.global_batch_size) == plan


def test_a_larger_micro_batch_is_worth_a_small_error() -> None:
    grid = PlanGrid(dp_size=2, micro_sizes=(8, 16, 32))
    assert grid.nearest(112).micro_batch_size == 8
    within = grid.nearest(112, tolerance=0.15)
    assert (within.micro_batch_size, within.global_batch_size) == (32, 128)
    assert grid.nearest(112, max_size=127, tolerance=0.15).global_batch_size == 96


def test_a_single_rank_can_be_made_to_have_two_parts() -> None:
    grid = PlanGrid(dp_size=1, micro_sizes=(16,), min_accumulation=2)
    assert grid.nearest(1).num_parts == 2
    with pytest.raises(ValueError, match="between 1 and 31"):
        grid.nearest(1, max_size=31)


def test_a_plan_counts_examples_and_parts() -> None:
    plan = BatchPlan(micro_batch_size=16, accumulation_steps=3, dp_size=4)
    assert (plan.global_batch_size, plan.num_parts) == (192, 12)


@pytest.mark.parametrize("name", ["micro_batch_size", "accumulation_steps", "dp_size"])
@pytest.mark.parametrize("bad", [0, -3])
def test_bad_plans_are_named(name: str, bad: int) -> None:
    numbers = {"micro_batch_size": 4, "accumulation_steps": 1, "dp_size": 1, name: bad}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got {bad}"):
        BatchPlan(**numbers)


@given(st.integers(1, 300), st.integers(1, 5000))
def test_micro_batch_sizes_double_up_to_the_largest_and_end_with_it(smallest: int, largest: int) -> None:
    if largest < smallest:
        with pytest.raises(ValueError, match=f"{smallest} and {largest}"):
            micro_batch_sizes(smallest, largest)
        return
    found = micro_batch_sizes(smallest, largest)
    expected = [smallest]
    while expected[-1] * 2 <= largest:
        expected.append(expected[-1] * 2)
    assert list(found) == sorted({*expected, largest})


def test_micro_batches_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="0 and 8"):
        micro_batch_sizes(0, 8)


# --- durations and progress -----------------------------------------------------------------------------------------


def test_durations_carry_their_unit() -> None:
    assert (examples(5).unit, tokens(5).unit, steps(5).unit) == ("examples", "tokens", "steps")
    assert str(examples(6_000_000)) == "6,000,000 examples"
    assert examples(6e6) == examples(6_000_000)  # type: ignore[arg-type]
    assert isinstance(examples(6e6).count, int)  # type: ignore[arg-type]
    assert examples(5) != steps(5)


def test_bad_durations_are_named() -> None:
    with pytest.raises(ValueError, match="-1 steps"):
        steps(-1)
    for bad in (math.nan, math.inf, 0.5, 1e6 + 0.25):
        for unit in (examples, tokens, steps):
            with pytest.raises(ValueError, match=rf"whole number.*{re.escape(repr(bad))}"):
                unit(bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'epochs'"):
        Duration(3, "epochs")  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 10**12), max_size=20))
def test_progress_adds_up(sizes: list[int]) -> None:
    progress = counted = Progress()
    for size in sizes:
        progress = progress.after(size)
        counted = counted.after(size, 7 * size)
    assert progress == Progress(examples=sum(sizes), steps=len(sizes))
    if sizes:
        assert counted == Progress(examples=sum(sizes), steps=len(sizes), tokens=7 * sum(sizes))


@given(st.integers(0, 100), st.integers(0, 100))
def test_a_duration_is_over_at_its_end(consumed: int, length: int) -> None:
    progress = Progress(examples=consumed, steps=consumed, tokens=consumed)
    for duration in (examples(length), steps(length), tokens(length)):
        assert progress.reached(duration) == (consumed >= length)
        assert progress.count(duration.unit) == consumed


def test_a_count_is_that_of_all_updates_or_of_none() -> None:
    counted = Progress().after(8, 56, 1.0)
    with pytest.raises(ValueError, match="update 2 counts None tokens, which were 56 before it"):
        counted.after(8, None, 1.0)
    with pytest.raises(ValueError, match=r"update 2 counts None gain_steps, which were 1\.0 before it"):
        counted.after(8, 56)
    with pytest.raises(ValueError, match="update 2 counts 56 tokens, not in the updates before: count them in all"):
        Progress().after(8).after(8, 56)
    assert counted.after(8, 56, 0.5) == Progress(examples=16, steps=2, tokens=112, gain_steps=1.5)


def test_tokens_that_nobody_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens_per_example="):
        Progress(examples=5, steps=1).reached(tokens(10))


@given(grids(), sizes)
def test_plans_do_not_depend_on_the_order_of_the_micro_batches(grid: PlanGrid, wanted: float) -> None:
    assume(len(grid.micro_sizes) > 1)
    turned = PlanGrid(dp_size=grid.dp_size, micro_sizes=grid.micro_sizes[::-1], min_accumulation=grid.min_accumulation)
    assert turned.nearest(wanted) == grid.nearest(wanted)


@given(grids(), limits)
def test_boundless_wishes_end_at_the_limits(grid: PlanGrid, limit: tuple[int, int]) -> None:
    low, high = limit
    plans = all_plans(grid, low, high)
    assume(plans)
    reachable = [plan.global_batch_size for plan in plans]
    assert grid.nearest(math.inf, min_size=low, max_size=high).global_batch_size == max(reachable)
    for little in (0.0, -5.0, -math.inf):
        assert grid.nearest(little, min_size=low, max_size=high).global_batch_size == min(reachable)


def test_a_size_that_is_not_a_number_is_named() -> None:
    grid = PlanGrid(dp_size=1, micro_sizes=(4,))
    with pytest.raises(ValueError, match="got nan"):
        grid.nearest(math.nan)
    with pytest.raises(ValueError, match="got inf"):
        grid.nearest(math.inf)


@given(grids(), st.integers(1, 400))
def test_next_sizes_by_brute_force(grid: PlanGrid, size: int) -> None:
    able = sorted({plan.global_batch_size for plan in all_plans(grid, 1, 3000)})
    assert grid.next_above(size) == min(each for each in able if each > size)
    assert grid.next_below(size) == max((each for each in able if each < size), default=0)
