"""The cost of a step from timed steps, and how certain its price is."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from adabatch.report.evidence import T_95, WIDEST, step_cost_of
from adabatch.report.steps import RunSteps, read_steps

STEP, EXAMPLE = 0.02, 0.001
SIZES = [size for size in (8, 16, 32, 64) for _ in range(16)]
TIMES = np.array([STEP + EXAMPLE * size for size in SIZES])


def timed(sizes: list[int], seconds: np.ndarray | None = None, accumulation: int = 1) -> RunSteps:
    """A run of those micro-batches, whose times are exactly those of the model unless others are given.

    A line has the time of the step before it, so that the last step is not timed.
    """
    exact = [STEP + EXAMPLE * accumulation * size for size in sizes]
    begun = itertools.accumulate((accumulation * size for size in sizes), initial=0)
    lines, late = [], {}
    for step, (size, taken, examples) in enumerate(zip(sizes, exact, begun, strict=False)):
        plan = {"micro_batch_size": size, "accumulation_steps": accumulation, "dp_size": 1}
        plan["global_batch_size"] = accumulation * size
        line = {"format": 1, "step": step, "examples": examples, "plan": plan, "loss": 1.0, "applied": True}
        line |= {"moments": None, "averages": None, "next": size, "reason": "hold", **late}
        late = {"seconds": taken, "timed_plan": plan}
        lines.append(json.dumps(line))
    run = read_steps(lines, "run")
    return run if seconds is None else run._replace(seconds=seconds)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_exact_times_give_an_exact_price(accumulation):
    found = step_cost_of(timed([*SIZES, 64], accumulation=accumulation), gradient_bytes=8)
    assert found is not None
    assert (found.step, found.example) == pytest.approx((STEP, EXAMPLE))
    assert found.price_band == pytest.approx((1, 1), abs=1e-9)
    assert found.pivot == 24 * accumulation, "the median"
    assert found.gradient_bytes == 8


def test_all_times_count_and_not_the_last_ones():
    late = np.arange(len(SIZES)) % 16 >= 11
    found = step_cost_of(timed(SIZES, np.where(late & (np.array(SIZES) == 8), 3 * TIMES, TIMES)), gradient_bytes=0)
    assert found is not None
    assert found.step / found.example == pytest.approx(STEP / EXAMPLE)


MICRO = 0.005
"""Seconds of a micro-batch beside its examples."""


def mixed(plans: list[tuple[int, int]]) -> RunSteps:
    """A run of those micro-batch sizes and numbers of micro-batches, whose times are exactly those of the model."""
    run = timed([micro for micro, _ in plans])
    counts = np.array([count for _, count in plans])
    seconds = STEP + counts * (MICRO + EXAMPLE * run.micro_batch)
    return run._replace(accumulation=counts, batch=run.micro_batch * counts, seconds=seconds)


@pytest.mark.parametrize(
    ("plans", "step", "example"),
    [
        # The micro-batch grows: two of them are a part of each step.
        ([(8, 2), (16, 2), (32, 2), (64, 2)], STEP + 2 * MICRO, EXAMPLE),
        # In between, sizes that are no power of two take more and smaller ones.
        ([(8, 2), (8, 7), (8, 3), (16, 2), (16, 3), (16, 13)], STEP + 2 * MICRO, EXAMPLE),
        # At 16 it is at its limit: 16 x 4 could have been 32 x 2.
        ([(8, 2), (16, 2), (16, 3), (16, 4), (16, 5)], STEP, EXAMPLE + MICRO / 16),
        # It was never changed.
        ([(16, 2), (16, 3)], STEP, EXAMPLE + MICRO / 16),
    ],
    ids=["grows", "odd sizes", "at its limit", "one size"],
)
def test_the_fixed_cost_of_micro_batches_goes_where_their_number_goes(plans, step, example):
    found = step_cost_of(mixed(plans * 8), gradient_bytes=0)
    assert found.step / found.example == pytest.approx(step / example)
    assert found.price_band == pytest.approx((1, 1), abs=1e-9)


def test_examples_that_cost_nothing_in_a_micro_batch_cost_the_largest_one():
    run = mixed([(8, 2), (16, 2), (16, 3), (32, 2)] * 8)
    free = run._replace(seconds=STEP + run.accumulation * MICRO)
    found = step_cost_of(free, gradient_bytes=0)
    assert found.step / found.example == pytest.approx(STEP / (MICRO / 32))


def test_times_are_right_in_the_median_and_spread_around_it():
    """Steps of (16, 3) take one micro-batch longer than the cost of a step with two says."""
    found = step_cost_of(mixed([(8, 2), (16, 2), (16, 3), (16, 3), (16, 3)] * 8), gradient_bytes=0)
    two = STEP + 2 * MICRO + EXAMPLE * 48
    assert found.step + found.example * 48 == pytest.approx(two + MICRO)
    assert found.spread == pytest.approx((two / (two + MICRO), 1))


def test_the_band_widens_with_the_scatter():
    chance = np.random.default_rng(3).standard_normal(len(SIZES))
    bands = [
        step_cost_of(timed(SIZES, TIMES * np.exp(scatter * chance)), gradient_bytes=0).price_band
        for scatter in (0.01, 0.05, 0.2)
    ]
    assert all(low == pytest.approx(1 / high) for low, high in bands)
    assert 1 < bands[0][1] < bands[1][1] < bands[2][1] < WIDEST


def test_the_band_covers_the_price():
    """Two sides of 95 % each. The count of a binomial has its standard error, of which five are allowed."""
    run, chance, rounds, held = timed(SIZES), np.random.default_rng(4), 100, 0
    for _ in range(rounds):
        seconds = TIMES * np.exp(0.1 * chance.standard_normal(len(SIZES)))
        found = step_cost_of(run._replace(seconds=seconds), gradient_bytes=0)
        low, high = found.price_band
        held += low <= STEP / EXAMPLE / (found.step / found.example) <= high
    assert held / rounds == pytest.approx(0.9, abs=5 * math.sqrt(0.9 * 0.1 / rounds))


def test_the_band_is_that_of_a_jackknife():
    """Two sizes of one example and two have a price in closed form, from the medians of their times."""
    sizes = [1] * 24 + [2] * 24
    seconds = np.random.default_rng(5).uniform(0.9, 1.1, 48) * np.array([3.0 if size == 1 else 4.0 for size in sizes])

    def price(kept: np.ndarray) -> float:
        small, large = np.median(seconds[:24][kept[:24]]), np.median(seconds[24:][kept[24:]])
        return (2 * small - large) / (large - small)

    group = np.arange(48) % 8
    logs = [math.log(price(group != left_out)) for left_out in range(8)]
    error = math.sqrt(7 / 8 * sum((each - sum(logs) / 8) ** 2 for each in logs))
    found = step_cost_of(timed(sizes, seconds), gradient_bytes=0)
    assert found.step / found.example == pytest.approx(price(group >= 0))
    assert found.price_band[1] == pytest.approx(math.exp(T_95 * error))


@pytest.mark.parametrize(
    ("sizes", "band"),
    [
        ([32, 64] * 8, (1, 1)),  # fewer than two timed steps per group
        ([32] * 40, (1 / WIDEST, WIDEST)),
        ([32] * 40 + [64] * 2, (1 / WIDEST, WIDEST)),  # a single timing tells the price
        ([32] * 40 + [64] * 3, (1, 1)),
    ],
)
def test_what_tells_the_price(sizes, band):
    found = step_cost_of(timed(sizes), gradient_bytes=0)
    assert found is not None
    assert found.price_band == pytest.approx(band, abs=1e-9)


def test_a_step_that_may_cost_nothing_has_the_widest_band():
    # The median of the small steps is 1.05, so that a step costs 0.1; and 0.9 without a group of the longer ones, so
    # that it would cost less than nothing.
    sizes, seconds = [1] * 16 + [2] * 16, np.array([0.9, 1.2] * 8 + [2.0] * 16)
    found = step_cost_of(timed(sizes, seconds), gradient_bytes=0)
    assert found.step == pytest.approx(0.1)
    assert found.price_band == (1 / WIDEST, WIDEST)


def test_no_timed_step():
    run = timed(SIZES)
    assert step_cost_of(run._replace(seconds=np.full(len(SIZES), math.nan)), gradient_bytes=0) is None
