"""The critical batch of branches, against averages over single examples and a quadratic whose noise scale is known."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adabatch.batch import critical_batch, measure_critical_batch, smoothed_losses

STEPS = st.lists(st.tuples(st.floats(-5, 5), st.integers(1, 40)), min_size=1, max_size=12)


@given(STEPS, st.floats(1, 200))
def test_smoothing_is_an_average_over_single_examples(steps: list[tuple[float, int]], half_life: float) -> None:
    losses, sizes = zip(*steps, strict=True)
    ages = np.arange(sum(sizes))[::-1]
    each = np.repeat(losses, sizes)
    expected = np.average(each, weights=0.5 ** (ages / half_life))
    assert smoothed_losses(losses, sizes, half_life=half_life)[-1] == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_smoothing_does_not_depend_on_how_examples_are_cut_into_steps() -> None:
    whole = smoothed_losses([1.0, 3.0], [64, 64], half_life=50)[-1]
    fine = smoothed_losses([1.0] * 8 + [3.0] * 8, [8] * 16, half_life=50)[-1]
    assert whole == pytest.approx(fine, rel=1e-12)


def test_the_largest_size_within_the_tolerance_and_where_the_loss_leaves_it() -> None:
    found = critical_batch({64: 1.02, 8: 1.0, 16: 0.99, 32: 1.005}, tolerance=0.01)
    assert (found.size, found.is_bound) == (32, False)
    assert list(found.losses) == [8, 16, 32, 64]
    # a third of the way from 1.005 to 1.02, in the logarithm of the size
    assert found.crossing == pytest.approx(32 * 2 ** (1 / 3), rel=1e-9)
    assert found.ratio(64.0) == 0.5
    assert math.isnan(found.ratio(math.nan))
    assert math.isnan(found.ratio(0.0))


def test_a_size_that_passes_beyond_one_that_fails_is_chance() -> None:
    assert critical_batch({8: 1.0, 16: 1.2, 32: 1.0}).size == 8


def test_all_within_the_tolerance_is_a_lower_bound() -> None:
    found = critical_batch({8: 1.0, 16: 1.0})
    assert found.size == 16
    assert found.is_bound


@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_a_branch_that_diverged_is_out_of_tolerance(loss: float) -> None:
    found = critical_batch({8: 1.0, 16: 1.0, 32: loss})
    assert (found.size, found.crossing) == (16, 16.0)


def test_a_negative_loss_has_a_tolerance_too() -> None:
    assert critical_batch({8: -2.0, 16: -1.99, 32: -1.9}, tolerance=0.01).size == 16


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=6), st.floats(0.001, 0.1), st.floats(1, 3))
def test_a_larger_tolerance_never_has_a_smaller_critical_batch(
    losses: list[float], tolerance: float, times: float
) -> None:
    by_size = {8 * 2**i: loss for i, loss in enumerate(losses)}
    small, large = (critical_batch(by_size, tolerance=each) for each in (tolerance, tolerance * times))
    assert small.size <= large.size
    assert small.crossing <= large.crossing or small.crossing == pytest.approx(large.crossing)


@pytest.mark.parametrize(
    ("losses", "tolerance", "words"),
    [
        ({8: 1.0}, 0.1, r"no fewer than two batch sizes, got \[8\]"),
        ({0: 1.0, 8: 1.0}, 0.1, "at least 1 example, got 0"),
        ({8: 1.0, 16: 1.0}, 0.0, "tolerance must be a positive share"),
        ({8: math.nan, 16: 1.0}, 0.1, "smallest batch, 8, diverged"),
    ],
)
def test_what_cannot_be_compared_is_refused(losses: dict[int, float], tolerance: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        critical_batch(losses, tolerance=tolerance)


@pytest.mark.parametrize(
    ("arguments", "half_life", "words"),
    [
        (([1.0], [8, 8]), 8.0, "for each step"),
        (([1.0], [0]), 8.0, "batch sizes must be positive, got 0"),
        (([1.0], [8]), 0.0, "half_life must be a positive number of examples, got 0"),
    ],
)
def test_smoothing_refuses(arguments: Any, half_life: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        smoothed_losses(*arguments, half_life=half_life)


def test_a_larger_noise_scale_has_a_larger_critical_batch() -> None:
    """Expected losses of SGD on a quadratic far from its minimum: with the best rate of each batch size, a step of b
    examples takes the share b / (b + B) of what one without noise takes, so the critical batch grows with B."""

    def branch(noise_scale: float) -> Any:
        def steps(size: int) -> Iterator[tuple[int, float]]:
            loss = 1.0
            for _ in range(4096 // size):
                loss *= (1 - 0.01 / (1 + noise_scale / size)) ** 2
                yield size, loss

        return steps

    found = [
        measure_critical_batch(branch(scale), [8 * 2**i for i in range(7)], half_life=64, tolerance=0.01).crossing
        for scale in (200.0, 400.0, 800.0)
    ]
    assert found[0] < found[1] < found[2]


def test_branches_must_make_steps_and_consume_as_much() -> None:
    with pytest.raises(ValueError, match="batch size 8 ran no step"):
        measure_critical_batch(lambda size: [], [8, 16], half_life=8)
    with pytest.raises(ValueError, match="equally many examples"):
        measure_critical_batch(lambda size: [(size, 1.0)] * (100 if size == 8 else 1), [8, 16], half_life=8)
