"""What an example is worth, and the limit of what a batch that varies can win."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from adabatch import NoiseScale, NormTest, StepPrice
from adabatch.batch import Observation, Progress, adaptive_limit, efficiency
from adabatch.batch.moments import GradientMoments

scales = arrays(np.float64, st.integers(1, 30), elements=st.floats(1e-3, 1e6))


def seen(noise_scale: float) -> Observation:
    return Observation(GradientMoments.from_noise(noise_scale, 1.0, part_size=1, num_examples=64), Progress())


@given(st.floats(0.05, 0.95), st.floats(1, 1e6))
def test_at_rest_the_norm_test_is_worth_eta_squared(eta: float, noise_scale: float) -> None:
    rest = NormTest(eta).rest(seen(noise_scale))
    assert efficiency(rest, noise_scale) == pytest.approx(eta**2, rel=1e-6)


@given(st.floats(0.1, 10), st.floats(1, 1e6))
def test_at_a_multiple_of_the_noise_scale(multiple: float, noise_scale: float) -> None:
    wanted = NoiseScale(multiple).wanted(seen(noise_scale))
    assert efficiency(wanted, noise_scale) == pytest.approx(1 / (1 + multiple), rel=1e-6)


def test_efficiency_at_the_ends() -> None:
    assert efficiency(64, math.inf) == 1
    assert efficiency(0, 0) == 1
    assert efficiency(64, 0) == 0
    assert efficiency(64, 32, reference=64) == 1


# --- the price of a step ----------------------------------------------------------------------------------------------


@given(st.floats(1, 1e5), st.floats(1, 1e5))
def test_the_price_asks_for_the_batch_that_takes_least_time(noise_scale: float, price: float) -> None:
    """Against a search: a run takes ``(1 + B / b) (price + b)``."""
    wanted = StepPrice(price).wanted(seen(noise_scale))

    def seconds(size: float) -> float:
        return (1 + noise_scale / size) * (price + size)

    assert seconds(wanted) <= 1.0001 * min(seconds(size) for size in np.geomspace(wanted / 100, wanted * 100, 999))
    for wrong in (0.25, 4.0):
        assert seconds(StepPrice(price * wrong).wanted(seen(noise_scale))) <= 1.1251 * seconds(wanted)


@given(st.floats(1, 1e5), st.floats(1, 1e5), st.floats(1e-3, 1e3))
def test_the_price_does_not_depend_on_the_scale_of_gradients(noise_scale: float, price: float, times: float) -> None:
    observation = seen(noise_scale)
    assert observation.moments is not None
    scaled = observation._replace(moments=observation.moments.scaled(times))
    assert StepPrice(price).wanted(scaled) == pytest.approx(StepPrice(price).wanted(observation), rel=1e-6)


def test_the_price_names_what_it_does_not_know() -> None:
    price = StepPrice(512)
    assert price.wanted(seen(128)) == pytest.approx(256)
    assert math.isnan(price.wanted(Observation(None, Progress())))
    assert price.wanted(seen(0.0)) <= 0
    assert price.wanted(seen(-1.0)) <= 0
    assert price.wanted(Observation(GradientMoments(2.0, 8, 0.5, 16, 2), Progress())) == math.inf
    assert math.isnan(price.wanted(Observation(GradientMoments(2.0, 8, 2.0, 8, 1), Progress())))


def test_a_bad_price_is_named() -> None:
    for bad in (0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"examples must be a positive number, got {bad}"):
            StepPrice(bad)
    with pytest.raises(ValueError, match=r"norm must be one of euclidean.*, got 'l3'"):
        StepPrice(5, norm="l3")  # type: ignore[arg-type]


# --- the limit of what varying can win --------------------------------------------------------------------------------


@given(scales, st.floats(1e-3, 1e3))
def test_the_limit_is_never_below_one_and_knows_no_unit(noise_scales: np.ndarray, unit: float) -> None:
    limit = adaptive_limit(noise_scales)
    assert limit >= 1 - 1e-12
    assert adaptive_limit(noise_scales * unit) == pytest.approx(limit, rel=1e-9)


def test_the_limit_by_hand() -> None:
    assert adaptive_limit([100.0] * 7) == pytest.approx(1)
    assert adaptive_limit([1.0, 9.0]) == pytest.approx(5 / 4)
    assert adaptive_limit(np.linspace(0, 1, 100_001)) == pytest.approx(9 / 8, rel=1e-4)
    assert adaptive_limit([1.0, 9.0, math.nan, -3.0, math.inf, 0.0]) == pytest.approx(5 / 4)
    # A step of 1 at a noise scale of 1 makes half of a noiseless one's progress, a step of 9 at 9 too.
    assert adaptive_limit([1.0, 9.0], [1, 9]) == pytest.approx(5 / 4)
    assert adaptive_limit([1.0, 9.0], [1, 1]) == pytest.approx((5 * 1 + 9) / 6 / ((5 * 1 + 3) / 6) ** 2)


def test_the_limit_is_what_the_best_batches_win() -> None:
    """Against a search over constant batches, at the fewest examples that double the fewest possible steps."""
    rng = np.random.default_rng(0)
    noise = np.exp(rng.normal(3, 1.2, 400))  # at equal pieces of progress

    def cost(sizes: np.ndarray | float) -> tuple[float, float]:
        """Excess steps and examples: a piece of progress takes ``1 + B / b`` steps."""
        steps = 1 + noise / sizes
        return float(steps.mean()) - 1, float((steps * sizes).mean()) / noise.mean() - 1

    for constant in (5.0, 50.0, 500.0):
        steps, examples = cost(constant)
        assert steps * examples == pytest.approx(1)
    for price in (5.0, 500.0):
        steps, examples = cost(np.sqrt(noise * price))
        assert 1 / (steps * examples) == pytest.approx(adaptive_limit(noise), rel=1e-9)


def test_bad_input_of_the_limit() -> None:
    assert math.isnan(adaptive_limit([]))
    assert math.isnan(adaptive_limit([-1.0, math.nan]))
    with pytest.raises(ValueError, match="need a batch size for each noise scale"):
        adaptive_limit([1.0, 2.0], [8])
    with pytest.raises(ValueError, match="batch sizes must be positive, got 0"):
        adaptive_limit([1.0, 2.0], [8, 0])
