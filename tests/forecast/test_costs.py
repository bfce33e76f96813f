"""What a run costs, against closed forms and properties."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.properties import with_examples

from adabatch.forecast import Cluster, Evidence, StepCost, forecast, kaplan, knee, power_lines
from adabatch.forecast.costs import LEAST_EFFICIENCY, LEAST_STEPS, RISE, extended, largest_sensible
from adabatch.forecast.network import all_reduce_seconds

CLUSTER = Cluster(devices=8, bandwidth=1e10, latency=1e-5, price_per_hour=2.0)
COST = StepCost(step=0.01, example=0.001, gradient_bytes=1e8, spread=(0.9, 1.2))


def noise(scale: float = 500.0, batch: float = 64.0, band: tuple[float, float] = (0.5, 3.0)) -> Evidence:
    return Evidence(np.full(100, batch), np.full(100, batch), np.full(100, scale), band)


def test_against_the_closed_form():
    found = forecast(noise(), COST, CLUSTER)
    step = COST.step + all_reduce_seconds(CLUSTER, 1e8)
    progress = 6400 / (1 + 64 / 500)
    # (1 / b + 1 / B) (s + e b / p) is least at b = sqrt(B s p / e), where it is (sqrt(s) + sqrt(e B / p))^2 / B.
    least = progress / 500 * (math.sqrt(step) + math.sqrt(COST.example * 500 / 8)) ** 2
    assert found.price == pytest.approx(8 * step / COST.example)
    assert found.batch.point == pytest.approx(math.sqrt(500 * found.price))
    assert found.hours.point * 3600 == pytest.approx(least)
    assert found.device_hours.point == pytest.approx(8 * found.hours.point)
    assert found.money.point == pytest.approx(2 * found.device_hours.point)
    assert found.sent_bytes.point == pytest.approx(found.steps.point * 14e8)
    assert found.efficiency.point == pytest.approx(1 / (1 + found.batch.point / 500))


def test_the_batch_that_was_taken_costs_what_it_did():
    found = forecast(noise(), COST, CLUSTER, batch=64)
    assert found.steps.point == pytest.approx(100)
    assert found.examples.point == pytest.approx(6400)


@with_examples(60)
@given(
    st.floats(1, 1e5),
    st.floats(1, 1e4),
    st.floats(0, 1.0),
    st.floats(1e-6, 1.0),
    st.floats(0, 1e10),
    st.one_of(st.none(), st.floats(1, 1e4)),
)
def test_more_devices_never_cost_fewer_device_hours(scale, batch, step, example, size, constant):
    costs = StepCost(step, example, size)
    hours = [
        forecast(noise(scale, batch), costs, replace(CLUSTER, devices=p), batch=constant).device_hours.point
        for p in (1, 2, 3, 8, 64, 1000, 10_000)
    ]
    assert all(before <= after * (1 + 1e-9) for before, after in itertools.pairwise(hours))


@with_examples(60)
@given(st.floats(1, 1e5), st.floats(1, 1e4), st.floats(0.01, 1), st.floats(1, 50), st.integers(1, 4096))
def test_ranges_hold_the_point(scale, batch, low, high, devices):
    found = forecast(noise(scale, batch, (low, high)), COST, replace(CLUSTER, devices=devices))
    for each in (found.batch, found.steps, found.examples, found.hours, found.device_hours, found.money):
        assert 0 < each.low <= each.point <= each.high
    assert found.smallest_batch >= devices


def test_no_other_batch_takes_less_time():
    best = forecast(noise(), COST, CLUSTER)
    for factor in (0.25, 0.5, 0.9, 1.1, 2, 4):
        other = forecast(noise(), COST, CLUSTER, batch=factor * best.batch.point)
        assert other.hours.point > best.hours.point


def test_the_knee_is_where_device_hours_have_doubled():
    found = knee(noise(), COST, CLUSTER)
    alone, here, beyond = (
        forecast(noise(), COST, replace(CLUSTER, devices=p)).device_hours.point for p in (1, found, 2 * found)
    )
    assert here <= 2 * alone < beyond
    assert knee(noise(), COST, CLUSTER, most=1) == 1


def test_limits_are_kept():
    found = forecast(noise(), COST, CLUSTER, limits=(16, 32))
    assert (found.smallest_batch, found.largest_batch) == (32, 32)
    with pytest.raises(ValueError, match="must not exceed"):
        forecast(noise(), COST, CLUSTER, limits=(64, 32))


def test_a_run_is_cut():
    run = Evidence(np.array([10.0, 20, 30]), np.array([10.0, 20, 30]), np.array([1.0, 2, 3]), (0.5, 2))
    shorter = extended(run, 15)
    assert shorter.examples.tolist() == [10, 5]
    assert shorter.band == (0.5, 2)
    assert extended(run, 60).examples.tolist() == [10, 20, 30]
    with pytest.raises(ValueError, match="examples"):
        extended(run, 0)


def test_a_run_goes_on_as_the_power_law_through_its_last_quarter():
    # Four segments of a noise scale that is the law itself, so that the extension lies on it too.
    middles = np.array([0.125, 0.375, 0.625, 0.875]) * 1000
    run = Evidence(np.full(4, 250.0), np.array([10.0, 10, 10, 20]), 3 * middles**RISE, (0.5, 2))
    longer = extended(run, 5000)
    assert longer.examples.sum() == pytest.approx(5000)
    assert longer.examples[:4].tolist() == [250] * 4
    at = np.cumsum(longer.examples) - longer.examples / 2
    assert longer.noise_scale == pytest.approx(3 * at**RISE, rel=0.01)
    assert longer.batch[4:] == pytest.approx(20)
    # The band holds a noise scale that stays, as the mean of its logarithms, with twice the error of the probes.
    stays = np.where(np.arange(len(at)) < 4, longer.noise_scale, run.noise_scale[-1])
    rise = np.exp(np.average(np.log(longer.noise_scale / stays), weights=longer.examples))
    assert rise > 1.5
    error = math.hypot(math.log(4), math.log(rise))
    assert longer.band == pytest.approx((math.exp(-error), math.exp(error)), rel=1e-6)
    slightly = extended(run, 1001)
    assert slightly.band == pytest.approx((0.25, 4), rel=1e-3)


def test_a_wider_band_widens_every_range():
    def widths(band: tuple[float, float]) -> list[float]:
        found = forecast(noise(band=band), COST._replace(spread=(1.0, 1.0)), CLUSTER)
        ranges = (found.batch, found.steps, found.examples, found.efficiency, found.hours)
        return [each.high / each.low for each in ranges]

    none, narrow, wide = widths((1.0, 1.0)), widths((0.8, 1.25)), widths((0.5, 2.0))
    assert none == [1.0] * 5
    assert all(1 < small < large for small, large in zip(narrow, wide, strict=True))
    # The batch of the least time goes with the root of the noise scale.
    assert wide[0] == pytest.approx(2.0)


@given(st.floats(0, 10), st.floats(1e-6, 1), st.floats(1, 1e4), st.floats(1e-3, 1e3))
def test_a_typical_step_takes_as_long_at_another_price(step, example, pivot, factor):
    cost = StepCost(step, example, 8.0, (0.9, 1.2), (0.5, 2.0), pivot)
    other = cost.repriced(factor)
    assert other.step / other.example == pytest.approx(factor * step / example)
    assert other.step + other.example * pivot == pytest.approx(step + example * pivot)
    assert other[2:] == cost[2:]


def test_errors_add_like_independent_ones_and_keep_the_limits():
    """The batch is the root of noise scale times price."""
    sharp = COST._replace(spread=(1.0, 1.0), price_band=(1 / 9, 16.0))
    alone, wide = Cluster(devices=1, bandwidth=math.inf), noise(scale=1e4, band=(1 / 4, 4.0))
    found = forecast(wide, sharp, alone)
    low, high = (math.hypot(math.log(2), math.log(factor)) for factor in (3, 4))
    assert found.batch.low == pytest.approx(found.batch.point * math.exp(-low))
    assert found.batch.high == pytest.approx(found.batch.point * math.exp(high))
    held = forecast(wide, sharp, alone, limits=(None, 3 * found.batch.point))
    assert held.batch.high == pytest.approx(3 * found.batch.point)


def test_a_run_of_so_many_examples_takes_them_whatever_the_errors():
    found = forecast(noise(), COST, CLUSTER, examples=5e4)
    assert found.examples == pytest.approx((5e4, 5e4, 5e4))
    assert found.steps == pytest.approx([5e4 / batch for batch in reversed(found.batch)])
    free = forecast(noise(), COST, CLUSTER)
    assert found.hours.point / free.hours.point == pytest.approx(5e4 / free.examples.point)
    assert found.batch == pytest.approx(free.batch)
    with pytest.raises(ValueError, match="examples must be positive"):
        forecast(noise(), COST, CLUSTER, examples=0)


def test_an_error_that_lowers_a_number_either_way_hides_no_other():
    """A price far off either way needs less time than the one that was measured; the spread of times still shows."""
    sharp = COST._replace(spread=(0.9, 1.2), price_band=(1e-3, 1e3), pivot=64.0)
    found = forecast(noise(band=(1.0, 1.0)), sharp, Cluster(devices=1, bandwidth=math.inf), limits=(16, 256))
    assert found.hours.high == pytest.approx(1.2 * found.hours.point)
    assert found.hours.low < 0.9 * found.hours.point


def test_the_error_of_the_price_is_in_every_range():
    band, sharp, certain = (0.25, 9.0), noise(band=(1.0, 1.0)), COST._replace(spread=(1.0, 1.0), pivot=64.0)
    found = forecast(sharp, certain._replace(price_band=band), CLUSTER)
    ends = [forecast(sharp, certain.repriced(factor), CLUSTER) for factor in band]
    point = forecast(sharp, certain, CLUSTER)
    for name in ("batch", "steps", "examples", "efficiency", "hours", "device_hours", "money", "sent_bytes"):
        at_ends = [getattr(each, name).point for each in ends]
        each = getattr(found, name)
        assert each.point == getattr(point, name).point
        assert (each.low, each.high) == pytest.approx((min(*at_ends, each.point), max(*at_ends, each.point)))
        assert each.low < each.high
    # Without a network, the batch goes with the root of the price.
    alone = forecast(sharp, certain._replace(price_band=band), Cluster(devices=1, bandwidth=math.inf))
    assert alone.batch == pytest.approx(np.array([0.5, 1, 3]) * alone.batch.point)
    # The limits go with StepPrice, whose price is the one that was measured.
    assert (found.smallest_batch, found.largest_batch) == (point.smallest_batch, point.largest_batch)


def test_the_largest_batch_leaves_steps_and_efficiency():
    # 1 / LEAST_EFFICIENCY - 1 noise scales, where the run is long enough.
    long = Evidence(np.full(10, 1e6), np.full(10, 64.0), np.linspace(100, 500, 10))
    assert largest_sensible(long) == pytest.approx(500 * (1 / LEAST_EFFICIENCY - 1))
    short = noise(1e5, 64.0)
    most = largest_sensible(short)
    assert most == pytest.approx(6400 / (1 + 64 / 1e5) / LEAST_STEPS)
    dear = COST._replace(step=1e3)
    assert forecast(short, dear, CLUSTER, limits=(None, most)).steps.point >= LEAST_STEPS
    assert forecast(short, dear, CLUSTER).steps.point < LEAST_STEPS
    found = forecast(long, dear, CLUSTER, limits=(None, largest_sensible(long)))
    assert 1 / (1 + found.largest_batch / 500) >= LEAST_EFFICIENCY * (1 - 1e-9)


@pytest.mark.parametrize(
    ("evidence", "cost"),
    [
        (noise(math.inf), COST),
        (noise(0.0), COST),
        (noise(band=(1.1, 2)), COST),
        (noise(), COST._replace(example=0.0)),
        (noise(), COST._replace(step=-1.0)),
        (noise(), COST._replace(spread=(0.5, 0.9))),
        (noise(), COST._replace(price_band=(1.1, 2.0))),
        (noise(), COST._replace(pivot=0.0)),
    ],
)
def test_what_cannot_be_is_refused(evidence, cost):
    with pytest.raises(ValueError, match=r"positive|factors"):
        forecast(evidence, cost, CLUSTER)


def test_published_laws():
    # The numbers that the papers print. Kaplan et al. have 1 to 2 million tokens for their largest models, and a batch
    # that doubles with each 13 % of the loss.
    assert kaplan(1.0).tokens == 2.1e8
    assert kaplan(0.87).tokens / kaplan(1.0).tokens == pytest.approx(2, rel=0.05)
    assert 1e6 < kaplan(3.0).tokens < kaplan(2.6).tokens < 2.5e6
    # Sequences of 2048 tokens: 676 of them at a billion tokens.
    assert power_lines(1e9).tokens / 2048 == pytest.approx(0.0471 * 1e9**0.462)
    assert power_lines(2e9).tokens / power_lines(1e9).tokens == pytest.approx(2**0.462)
    assert "2505.13738" in power_lines(1e9).source
    assert "2001.08361" in kaplan(3.0).source
    for law in (power_lines, kaplan):
        with pytest.raises(ValueError, match="positive"):
            law(0)


def test_a_law_says_where_it_was_fitted():
    assert [power_lines(tokens).inside for tokens in (1e9, 1e10, 1e12)] == [False, True, False]
    assert [kaplan(loss).inside for loss in (2.0, 4.0, 20.0)] == [False, True, False]
