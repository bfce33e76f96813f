"""The batch factor: its rules, the limits of the gain, and what happens before anything is measured."""

from __future__ import annotations

import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adabatch.lr.rules import LRRule, check_lr_rule, followed, gain, lr_factor

ratios = st.floats(1e-3, 1e4)
positive = st.floats(1e-6, 1e6)
anything = st.one_of(
    st.floats(), st.sampled_from([0.0, 5e-324, 1e-300, 1.0, 1e300, 1.7e308, math.inf, -math.inf, math.nan])
)
references = st.floats(1, 1e5)


@given(references, ratios)
def test_the_three_rules_that_measure_nothing(reference: float, ratio: float) -> None:
    size = ratio * reference
    assert lr_factor("none", size, reference=reference) == 1
    assert lr_factor("linear", size, reference=reference) == pytest.approx(ratio, rel=1e-12)
    assert lr_factor("sqrt", size, reference=reference) == pytest.approx(math.sqrt(ratio), rel=1e-12)


@pytest.mark.parametrize("rule", get_args(LRRule))
@given(references, positive, positive)
def test_at_the_reference_the_factor_is_one(rule: LRRule, reference: float, noise: float, signal: float) -> None:
    assert lr_factor(rule, reference, reference=reference, noise=noise, signal=signal) == 1


@given(ratios, references, positive, positive)
def test_the_gain_is_its_definition(ratio: float, reference: float, noise: float, signal: float) -> None:
    small, large = noise / reference + signal, noise / (ratio * reference) + signal
    found = gain(ratio, reference, noise=noise, signal=signal)
    assert found == pytest.approx(small / large, rel=1e-12)
    assert min(1, ratio) <= found <= max(1, ratio)
    through = lr_factor("gain", ratio * reference, reference=reference, noise=noise, signal=signal)
    assert through == pytest.approx(found, rel=1e-12)


@given(st.floats(1, 1e4), st.floats(1, 1e4), references, positive, positive)
def test_the_gain_grows_with_the_batch_and_with_the_noise(
    one: float, other: float, reference: float, noise: float, signal: float
) -> None:
    less, more = min(one, other), max(one, other)
    by_batch = [gain(ratio, reference, noise=noise, signal=signal) for ratio in (less, more)]
    by_noise = [gain(one, reference, noise=noise * factor, signal=signal) for factor in (less, more)]
    assert by_batch[0] <= by_batch[1] * (1 + 1e-12)
    assert by_noise[0] <= by_noise[1] * (1 + 1e-12)


@given(ratios, references)
def test_the_limits_of_the_gain(ratio: float, reference: float) -> None:
    """Linear scaling where noise is all there is, none where there is no noise."""
    assert gain(ratio, reference, noise=1.0, signal=0.0) == ratio
    assert gain(ratio, reference, noise=1.0, signal=-0.1) == ratio
    assert gain(ratio, reference, noise=1.0, signal=1e-15) == pytest.approx(ratio, rel=1e-5)
    assert gain(ratio, reference, noise=0.0, signal=1.0) == 1
    assert gain(ratio, reference, noise=-0.1, signal=1.0) == 1
    assert gain(ratio, reference, noise=1e-15, signal=1.0) == pytest.approx(1, rel=1e-10)


@given(anything, anything, ratios)
def test_no_measurement_leaves_the_bounds(noise: float, signal: float, ratio: float) -> None:
    """A learning rate must not become NaN, whatever was measured."""
    found = gain(ratio, 64.0, noise=noise, signal=signal)
    assert min(1, ratio) <= found <= max(1, ratio)


def test_nothing_measured_yet_is_no_gain() -> None:
    assert lr_factor("gain", 512, reference=64) == 1
    assert gain(8.0, 64.0, noise=math.nan, signal=1.0) == 1
    assert gain(8.0, 64.0, noise=1.0, signal=math.nan) == 1


def test_the_gain_of_a_published_example() -> None:
    """Noise 2048 and squared norm 1 an example, reference 32: 1.97, 3.82 and 7.22 at 2, 4 and 8 times the batch."""
    for size, expected in ((32, 1.0), (64, 1.9696969696969697), (128, 3.823529411764706), (256, 7.222222222222222)):
        assert lr_factor("gain", size, reference=32, noise=2048.0, signal=1.0) == pytest.approx(expected, rel=1e-15)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="none, linear, sqrt, gain, sqrt_gain, got 'square root'"):
        check_lr_rule("square root")
    with pytest.raises(ValueError, match="got 'cubic'"):
        lr_factor("cubic", 64, reference=64)  # type: ignore[arg-type]
    for size, reference in ((0, 64), (64, 0), (-1, 64), (64, math.nan), (math.nan, 64), (math.inf, 64), (64, math.inf)):
        with pytest.raises(ValueError, match=f"got {size} and the reference {reference}"):
            lr_factor("linear", size, reference=reference)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_settings_follow_no_step_of_no_size_and_no_factor_of_nothing(value: float) -> None:
    group = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    with pytest.raises(ValueError, match=f"ratio must be positive and finite, got {value}"):
        followed(group, ("eps",), ratio=value, factor=1.0)
    with pytest.raises(ValueError, match=f"factor must be positive and finite, got {value}"):
        followed(group, ("weight_decay",), ratio=2.0, factor=value)
