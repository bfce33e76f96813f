"""Gradient moments against explicit per-example gradients: the array of all of them is the oracle.

Closed forms are held to 1e-12 of the largest number that enters a difference; Monte Carlo to five standard errors.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from adabatch.batch.criteria import InnerProductTest, NormTest, Observation, OrthogonalityTest
from adabatch.batch.moments import GradientMoments, from_examples, from_parts, from_signs
from adabatch.batch.plan import Progress

Array = NDArray[np.float64]


# --- the oracle: everything from the gradients themselves -----------------------------------------------------------


def trace_of_covariance(gradients: Array) -> float:
    """Unbiased trace of the covariance of per-example gradients, shape (num_examples, d)."""
    return float(np.cov(gradients.T, ddof=1).reshape(gradients.shape[1], -1).trace())


def moments_of(gradients: Array, sizes: list[int], weights: list[float] | None = None) -> GradientMoments:
    """Moments of consecutive parts of the examples, the slow way."""
    ends = list(itertools.accumulate(sizes))
    parts = [gradients[end - size : end].mean(axis=0) for end, size in zip(ends, sizes, strict=True)]
    shares = [size / sum(sizes) for size in sizes] if weights is None else weights
    grad = sum(share * part for share, part in zip(shares, parts, strict=True))
    return from_parts([part @ part for part in parts], sizes, float(grad @ grad), weights=weights)


def moments_of_examples(gradients: Array) -> GradientMoments:
    return from_examples((gradients**2).sum(axis=1), gradients @ gradients.mean(axis=0))


def random_gradients(seed: int, num_examples: int, d: int, *, length: float = 1.0) -> Array:
    rng = np.random.default_rng(seed)
    return length * rng.standard_normal(d) + rng.standard_normal((num_examples, d)) * rng.uniform(0.1, 3, d)


def assert_equal(one: GradientMoments, other: GradientMoments, *, rel: float = 1e-12) -> None:
    assert one.num_parts == other.num_parts
    assert one[:4] == pytest.approx(other[:4], rel=rel)
    assert (one.noise_along is None) == (other.noise_along is None)
    assert one.noise_along is None or one.noise_along == pytest.approx(other.noise_along, rel=rel)


seeds = st.integers(0, 2**32 - 1)
part_sizes = st.lists(st.integers(1, 9), min_size=2, max_size=6)


# --- single formulas ------------------------------------------------------------------------------------------------


@given(seeds, st.integers(2, 40), st.integers(1, 8))
def test_single_examples_as_parts_give_the_sample_covariance(seed: int, num_examples: int, d: int) -> None:
    gradients = random_gradients(seed, num_examples, d)
    moments = moments_of(gradients, [1] * num_examples)
    largest = float((gradients**2).sum(axis=1).max())
    noise = trace_of_covariance(gradients)
    assert moments.noise == pytest.approx(noise, abs=1e-12 * num_examples * largest)
    mean = gradients.mean(axis=0)
    assert moments.signal == pytest.approx(mean @ mean - noise / num_examples, abs=1e-12 * num_examples * largest)
    assert moments.num_parts == num_examples
    assert (moments.part_size, moments.num_examples) == pytest.approx((1, num_examples), rel=1e-12)


@given(seeds, part_sizes)
def test_parts_follow_their_definition(seed: int, sizes: list[int]) -> None:
    gradients = random_gradients(seed, sum(sizes), 5)
    moments = moments_of(gradients, sizes)
    ends = list(itertools.accumulate(sizes))
    squares = [
        float((gradients[end - size : end].mean(axis=0) ** 2).sum()) for end, size in zip(ends, sizes, strict=True)
    ]
    total = sum(sizes)
    assert moments.part_sq == pytest.approx(
        sum(n / total * sq for n, sq in zip(sizes, squares, strict=True)), rel=1e-12
    )
    assert moments.grad_sq == pytest.approx(float((gradients.mean(axis=0) ** 2).sum()), rel=1e-12)
    assert moments.part_size == pytest.approx(total / len(sizes), rel=1e-12)
    assert moments.num_examples == pytest.approx(total, rel=1e-12)


@given(seeds, st.integers(2, 5), st.integers(2, 6))
def test_the_pooled_variance_is_that_of_all_examples(seed: int, groups: int, size: int) -> None:
    """Within-group spread over its own degrees of freedom plus between-group spread is one variance, not two.

    Adding a mean of variances to a variance of means counts terms of 1/size twice; pooled sums of squares do not.
    """
    gradients = random_gradients(seed, groups * size, 4)
    split = gradients.reshape(groups, size, -1)
    within = sum((size - 1) * trace_of_covariance(group) for group in split)
    between = size * ((split.mean(axis=1) - gradients.mean(axis=0)) ** 2).sum()
    pooled = (within + between) / (groups * size - 1)
    assert moments_of_examples(gradients).noise == pytest.approx(pooled, rel=1e-9)


def test_the_noise_does_not_depend_on_how_examples_are_split() -> None:
    """Over all assignments of the same six examples to parts, the mean is their sample variance, exactly."""
    gradients = random_gradients(1, 6, 3)
    expected = moments_of_examples(gradients)
    for sizes in ([2, 2, 2], [3, 3], [1, 5], [1, 2, 3], [1, 1, 1, 1, 2]):
        splits = [moments_of(gradients[list(order)], sizes) for order in itertools.permutations(range(6))]
        assert np.mean([each.noise for each in splits]) == pytest.approx(expected.noise, rel=1e-12)
        assert np.mean([each.signal for each in splits]) == pytest.approx(expected.signal, rel=1e-11)


# --- unbiased -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "weights"),
    [
        ([4, 4, 4, 4], None),
        ([1, 2, 5, 8], None),
        ([16, 1], None),
        ([1, 2, 5, 8], [0.25, 0.25, 0.25, 0.25]),
        ([1, 2, 5, 8], [0.6, 0.1, 0.25, 0.05]),
    ],
    ids=["equal", "unequal", "two", "unequal, equal weights", "unequal, any weights"],
)
def test_noise_and_signal_are_unbiased(sizes: list[int], weights: list[float] | None) -> None:
    """Skewed examples with correlated coordinates, 8,000 batches, five standard errors."""
    rng = np.random.default_rng(20)
    num_trials, d = 8000, 4
    mixing = rng.standard_normal((d, d))
    truth = np.array([1.0, -0.5, 0.25, 0.0])
    noise, signal = float((mixing**2).sum()), float(truth @ truth)
    # The mean of n standard exponentials, less its expectation: a gamma of shape n, so examples need not be drawn.
    parts = np.stack([rng.gamma(n, 1 / n, (num_trials, d)) - 1 for n in sizes], axis=1) @ mixing.T + truth
    shares = np.array(sizes) / sum(sizes) if weights is None else np.array(weights)
    grads = np.einsum("j,tjd->td", shares, parts)
    parts_sq, grads_sq = (parts**2).sum(axis=2), (grads**2).sum(axis=1)
    estimates = [from_parts(sq, sizes, g, weights=weights) for sq, g in zip(parts_sq, grads_sq, strict=True)]
    for name, expected in (("noise", noise), ("signal", signal)):
        values = np.array([getattr(each, name) for each in estimates])
        error = values.std(ddof=1) / math.sqrt(num_trials)
        assert abs(values.mean() - expected) < 5 * error, f"{name}: {values.mean()} +- {error}, expected {expected}"
        assert error < 0.02 * noise, "the test must be able to see a bias of a few percent"


def gaussian_parts(rng: np.random.Generator, trials: int, num_parts: int, part_size: int, d: int) -> Array:
    """Mean gradients of parts of pure unit noise per example (trace d), shape (trials, num_parts, d)."""
    return rng.standard_normal((trials, num_parts, d)) / math.sqrt(part_size)


def test_the_variance_of_means_plus_the_mean_of_variances_is_too_large() -> None:
    """The law of total variance, as the AdAdaGrad code means it: 1 + (J - 1) / (J mu) times the truth, 1.375 here."""
    rng = np.random.default_rng(3)
    num_workers, size, d, trials = 4, 2, 30, 2000
    examples = rng.standard_normal((trials, num_workers, size, d))
    within = examples.var(axis=2, ddof=1).sum(axis=-1).mean(axis=1)
    between = examples.mean(axis=2).var(axis=1, ddof=0).sum(axis=-1)
    total = (within + between) / d
    error = total.std(ddof=1) / math.sqrt(trials)
    assert abs(total.mean() - 1.375) < 5 * error
    ours = np.array([moments_of_examples(each.reshape(-1, d)).noise / d for each in examples])
    assert abs(ours.mean() - 1) < 5 * ours.std(ddof=1) / math.sqrt(trials)


def test_the_printed_ddp_norm_stalls_and_ours_does_not() -> None:
    """The test of arXiv 2412.21124 as printed, sum_j |g_j - g|^2 / (J eta^2 |g|^2), lacks the factor b / (J - 1).

    However large the noise, its expectation stays near (J - 1) / eta^2, so a batch of that size never grows again.
    Measured from worker gradients alone, ours asks for b / eta^2 in the same noise.
    """
    rng = np.random.default_rng(4)
    num_workers, eta, d = 4, 0.2, 400
    bound = (num_workers - 1) / eta**2
    for local in (16, 64, 256):
        batch = num_workers * local
        workers = gaussian_parts(rng, 200, num_workers, local, d)
        mean = workers.mean(axis=1)
        grad_sq = (mean**2).sum(axis=-1)
        spread = ((workers - mean[:, None]) ** 2).sum(axis=(1, 2))
        printed = spread / (num_workers * eta**2 * grad_sq)
        # a ratio of chi-squares with about 3d and d degrees of freedom: 6 % a trial, 0.5 % the median
        assert np.median(printed) == pytest.approx(bound, rel=0.03)
        squares = (workers**2).sum(axis=-1)
        ours = [
            NormTest(eta).wanted(Observation(from_parts(sq, local, g), Progress()))
            for sq, g in zip(squares, grad_sq, strict=True)
        ]
        assert np.median(ours) == pytest.approx(batch / eta**2, rel=0.03)


# --- closed forms of the other tests --------------------------------------------------------------------------------


@given(seeds, st.integers(2, 30), st.integers(1, 8))
def test_noise_along_and_across_by_brute_force(seed: int, num_examples: int, d: int) -> None:
    gradients = random_gradients(seed, num_examples, d)
    mean = gradients.mean(axis=0)
    moments = moments_of_examples(gradients)
    scale = float((gradients**2).sum())
    products = gradients @ mean
    assert moments.noise_along is not None
    assert moments.noise_along == pytest.approx(float(products.var(ddof=1)) / float(mean @ mean), rel=1e-9)
    across = gradients - np.outer(products, mean) / (mean @ mean)
    assert moments.noise_across == pytest.approx(trace_of_covariance(across), abs=1e-12 * scale * num_examples)


@given(seeds, st.integers(2, 30), st.integers(2, 8), st.floats(0.01, 2), st.floats(0.01, 2), st.floats(0.01, 9))
def test_the_three_tests_add_up(seed: int, num_examples: int, d: int, eta: float, theta: float, nu: float) -> None:
    """V = V_across + V_ip / |g|^2, so eta^2 b_norm = theta^2 b_ip + nu^2 b_orth before rounding."""
    gradients = random_gradients(seed, num_examples, d)
    seen = Observation(moments_of_examples(gradients), Progress())
    norm = eta**2 * NormTest(eta).wanted(seen)
    others = theta**2 * InnerProductTest(theta).wanted(seen) + nu**2 * OrthogonalityTest(nu).wanted(seen)
    assert norm == pytest.approx(others, rel=1e-9)


# --- round trips and scale ------------------------------------------------------------------------------------------


@given(
    st.floats(1e-6, 1e6),
    st.floats(-1e3, 1e6),
    st.floats(0.5, 64),
    st.floats(1.5, 100),
)
def test_from_noise_is_the_inverse(noise: float, signal: float, part_size: float, parts: float) -> None:
    moments = GradientMoments.from_noise(noise, signal, part_size=part_size, num_examples=part_size * parts)
    # the difference of two sums: the error is that of the larger term, over how far the two sizes are apart
    scale = (abs(signal) * part_size + noise) * parts / (parts - 1)
    assert moments.noise == pytest.approx(noise, abs=1e-14 * scale)
    assert moments.signal == pytest.approx(signal, abs=1e-14 * scale / part_size)


@given(seeds, part_sizes, st.floats(1e-6, 1e6))
def test_scaling_squares_every_number(seed: int, sizes: list[int], factor: float) -> None:
    gradients = random_gradients(seed, sum(sizes), 4)
    assert_equal(moments_of(gradients, sizes).scaled(factor), moments_of(factor * gradients, sizes))
    # the variance of the products cancels where they are nearly equal: the digits of the larger term are kept
    one, other = moments_of_examples(gradients).scaled(factor), moments_of_examples(factor * gradients)
    assert_equal(one, other, rel=1e-9)


def test_scaling_reaches_what_is_measured_beside_the_squares() -> None:
    moments = GradientMoments.from_noise(8.0, 2.0, part_size=1, num_examples=4)
    every = moments._replace(grad_l1=3.0, grad_l2=2.0, noise_at_quantile=5.0, layers={"a": moments})
    scaled = every.scaled(-2.0)
    assert (scaled.grad_l1, scaled.grad_l2, scaled.noise_at_quantile) == (6.0, 4.0, 20.0)
    assert scaled.layers == {"a": moments.scaled(2.0)}


# --- the l1 norm ----------------------------------------------------------------------------------------------------


def signs_of(parts: Array, part_size: float) -> GradientMoments:
    """Moments in the norm "sign" of parts of one size, shape (num_parts, d)."""
    mean, num_parts = parts.mean(axis=0), len(parts)
    deviations = float(parts.std(axis=0).sum())
    return from_signs(
        deviations,
        float(np.abs(mean).sum()),
        part_size=part_size,
        num_examples=part_size * num_parts,
        num_parts=num_parts,
    )


@pytest.mark.parametrize("num_parts", [2, 4, 16])
def test_the_noise_in_the_l1_norm_is_the_squared_sum_of_deviations(num_parts: int) -> None:
    """From normal parts, whose unbiased variances have roots that are too small: at two parts by a fifth."""
    rng = np.random.default_rng(5)
    sigma, size, trials = rng.uniform(0.5, 2, 400), 8, 200
    drawn = rng.standard_normal((trials, num_parts, 400)) * sigma / math.sqrt(size)
    found = [math.sqrt(signs_of(parts, size).noise) for parts in drawn]
    error = float(np.std(found)) / math.sqrt(trials)
    assert np.mean(found) == pytest.approx(sigma.sum(), abs=5 * error)
    roots = (np.sqrt(size) * drawn.std(axis=1, ddof=1)).sum(axis=1)
    assert roots.mean() < sigma.sum() - 5 * error


@pytest.mark.parametrize(
    ("length", "low", "high"), [(0.0, 0.0, 0.0), (0.1, 0.60, 0.70), (1.0, 0.64, 0.80), (30.0, 0.99, 1.01)]
)
def test_the_signal_in_the_l1_norm_is_within_what_is_promised(length: float, low: float, high: float) -> None:
    """``length`` of each coordinate is in units of the gradient's noise; the bounds are in units of the truth."""
    rng = np.random.default_rng(6)
    d, trials = 20_000, 40
    drawn = rng.standard_normal((trials, 8, d)) * math.sqrt(8) + length
    found = np.array([signs_of(parts, 1.0).signal for parts in drawn]) / d**2
    error = 5 * float(found.std()) / math.sqrt(trials)
    assert low * length**2 - error <= found.mean() <= high * length**2 + error


def test_one_part_shows_no_noise_in_the_l1_norm() -> None:
    moments = from_signs(0.0, 3.0, part_size=4, num_examples=4, num_parts=1)
    assert math.isnan(moments.noise)
    assert moments.is_finite
    assert (moments.grad_sq, moments.grad_l1, moments.norm) == (9.0, 3.0, "sign")


def test_noise_scale_is_not_a_number_without_signal() -> None:
    assert GradientMoments.from_noise(8.0, 2.0, part_size=1, num_examples=4).noise_scale == 4.0
    assert math.isnan(GradientMoments.from_noise(8.0, 0.0, part_size=1, num_examples=4).noise_scale)
    assert math.isnan(GradientMoments.from_noise(8.0, -1.0, part_size=1, num_examples=4).noise_scale)


# --- what cannot be measured, and bad input -------------------------------------------------------------------------


def test_one_part_has_no_spread() -> None:
    moments = from_parts([3.0], 4, 3.0)
    assert math.isnan(moments.noise)
    assert math.isnan(moments.signal)
    assert math.isnan(moments.noise_scale)
    assert moments.is_finite


def test_weights_on_a_single_part_show_no_spread() -> None:
    moments = from_parts([3.0, 5.0], 4, 3.0, weights=[1.0, 0.0])
    assert math.isnan(moments.noise)
    assert math.isnan(moments.signal)


@given(st.floats(0, 1e3), st.floats(0, 1e3), st.integers(0, 3))
def test_sizes_that_cannot_be_told_apart_show_no_spread(part_size: float, num_examples: float, num_parts: int) -> None:
    """Whatever the sizes, a property never raises: next to each other, their reciprocals may be equal."""
    moments = GradientMoments(2.0, part_size, 1.0, num_examples, num_parts)
    assert math.isnan(moments.noise) or (num_parts > 1 and part_size < num_examples)
    nearly = GradientMoments(2.0, 49.0, 1.0, math.nextafter(49.0, 50.0), 2)
    assert 1 / nearly.part_size == 1 / nearly.num_examples
    assert math.isnan(nearly.noise)


def test_parts_as_large_as_the_batch_are_refused() -> None:
    for part_size in (4.0, 5.0, math.nan):
        with pytest.raises(ValueError, match=f"{part_size}"):
            GradientMoments.from_noise(1.0, 1.0, part_size=part_size, num_examples=4.0)


def test_identical_examples_have_no_noise() -> None:
    moments = moments_of_examples(np.tile([3.0, 4.0], (5, 1)))
    assert (moments.noise, moments.signal, moments.noise_along) == (0.0, 25.0, 0.0)


def test_unmeasured_noise_along_is_none() -> None:
    moments = moments_of(random_gradients(0, 4, 2), [2, 2])
    assert moments.noise_along is None
    assert math.isnan(moments.noise_across)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_finiteness_is_that_of_the_squared_norms(bad: float) -> None:
    good = GradientMoments(part_sq=2.0, part_size=1.0, grad_sq=1.0, num_examples=4.0, num_parts=4)
    assert good.is_finite
    assert not good._replace(part_sq=bad).is_finite
    assert not good._replace(grad_sq=bad).is_finite


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"parts_sq": [], "sizes": 1, "grad_sq": 0.0}, "at least one part"),
        ({"parts_sq": [1.0, 1.0], "sizes": [1, 0], "grad_sq": 0.0}, r"\[1.0, 0.0\]"),
        ({"parts_sq": [1.0, 1.0], "sizes": [1, -2], "grad_sq": 0.0}, r"\[1.0, -2.0\]"),
        ({"parts_sq": [1.0, 1.0], "sizes": [1, math.nan], "grad_sq": 0.0}, "nan"),
        ({"parts_sq": [1.0, 1.0], "sizes": [1, 1], "grad_sq": 0.0, "weights": [0.5, 0.6]}, "1.1"),
        ({"parts_sq": [1.0, 1.0], "sizes": [1, 1], "grad_sq": 0.0, "weights": [0.5, math.nan]}, "nan"),
    ],
)
def test_bad_parts_are_named(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        from_parts(**arguments)  # type: ignore[arg-type]


def test_bad_examples_are_named() -> None:
    for squares, products in (([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([[1.0, 2.0]], [[1.0, 2.0]])):
        with pytest.raises(ValueError, match="shapes"):
            from_examples(squares, products)
