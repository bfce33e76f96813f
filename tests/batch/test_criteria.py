"""One contract for all criteria, and each closed form against the smallest batch that passes its test."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from support.properties import with_examples

from adabatch.batch.criteria import (
    AugmentedInnerProductTest,
    CoordinateNormTest,
    Criterion,
    InnerProductTest,
    NoiseScale,
    NormTest,
    Observation,
    OrthogonalityTest,
    StepPrice,
    resting_size,
)
from adabatch.batch.moments import GradientMoments, from_examples
from adabatch.batch.needs import Needs
from adabatch.batch.plan import Progress

POPULATION = 5000


@dataclass(frozen=True)
class Contract:
    """How a criterion is made from a tolerance, and what it asks for in pure noise.

    Args:
        make: tolerance -> criterion; a smaller tolerance asks for more.
        in_noise: tolerance, batch size, share of the noise along the gradient -> size asked for without signal; the
            noise at the quantile is the inverse share of it.
        names: the arguments that must be positive.
    """

    make: Callable[[float], Criterion]
    in_noise: Callable[[float, float, float], float]
    names: tuple[str, ...]


CONTRACTS = {
    "NormTest": Contract(NormTest, lambda eta, b, _: b / eta**2, ("eta",)),
    "NormTest of a population": Contract(
        lambda eta: NormTest(eta, population=POPULATION),
        lambda eta, b, _: POPULATION / (1 + (POPULATION - 1) * eta**2 / b),
        (),
    ),
    "NoiseScale": Contract(lambda tolerance: NoiseScale(1 / tolerance), lambda *_: math.inf, ("multiple",)),
    "NoiseScale in another norm": Contract(
        lambda tolerance: NoiseScale(1 / tolerance, norm="adam"), lambda *_: math.inf, ()
    ),
    "StepPrice": Contract(lambda tolerance: StepPrice(1 / tolerance), lambda *_: math.inf, ("examples",)),
    "CoordinateNormTest": Contract(
        lambda eta: CoordinateNormTest(eta, quantile=0.9), lambda eta, b, share: b / max(share, 1e-3) / eta**2, ()
    ),
    "InnerProductTest": Contract(InnerProductTest, lambda theta, b, share: share * b / theta**2, ("theta",)),
    "OrthogonalityTest": Contract(OrthogonalityTest, lambda nu, b, share: (1 - share) * b / nu**2, ("nu",)),
    "AugmentedInnerProductTest": Contract(
        lambda tolerance: AugmentedInnerProductTest(tolerance, 2 * tolerance),
        lambda theta, b, share: max(share * b / theta**2, (1 - share) * b / (2 * theta) ** 2),
        ("theta", "nu"),
    ),
}

every_criterion = pytest.mark.parametrize("contract", CONTRACTS.values(), ids=CONTRACTS.keys())


def seen(moments: GradientMoments | None) -> Observation:
    return Observation(moments, Progress())


def expected(noise: float, signal: float, *, batch: float, share: float = 0.25) -> Observation:
    """What a batch would measure in expectation; ``share`` of the noise lies along the gradient."""
    return seen(shared(noise, signal, batch=batch, share=share))


def shared(noise: float, signal: float, *, batch: float, share: float) -> GradientMoments:
    """Moments with a share of the noise along the gradient, and its inverse at the quantile over coordinates."""
    moments = GradientMoments.from_noise(noise, signal, part_size=1.0, num_examples=batch, noise_along=share * noise)
    return moments._replace(noise_at_quantile=noise / max(share, 1e-3))


tolerances = st.floats(0.01, 5)
positive = st.floats(1e-3, 1e3)
batches = st.floats(2, 4096)
shares = st.floats(0, 1)
anything = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True), st.sampled_from([0.0, -0.0, -1.0, math.nan, math.inf, -math.inf])
)


# --- the contract ---------------------------------------------------------------------------------------------------


def more_than_noise(criterion: Criterion) -> bool:
    """Whether it reads a statistic beside noise and signal."""
    return criterion.needs.products or criterion.needs.quantile is not None


@every_criterion
def test_says_what_it_needs(contract: Contract) -> None:
    criterion = contract.make(0.5)
    assert isinstance(criterion, Criterion)
    assert criterion.needs
    assert criterion.needs.noise in ("euclidean", "adam")
    assert not criterion.needs.lacking(Needs(noise=criterion.needs.noise, products=True, quantile=0.9))
    assert criterion == contract.make(0.5)


@every_criterion
@given(tolerances, positive, st.floats(-1, 1e3), batches, shares, st.floats(1e-6, 1e6))
def test_does_not_depend_on_the_scale_of_gradients(
    contract: Contract, tolerance: float, noise: float, signal: float, batch: float, share: float, scale: float
) -> None:
    criterion = contract.make(tolerance)
    observation = expected(noise, signal, batch=batch, share=share)
    assert observation.moments is not None
    # the quotient of two differences: ill-conditioned where either vanishes, and then the sign may turn
    assume(min(abs(observation.moments.signal), abs(observation.moments.grad_sq)) > 1e-6 * noise)
    scaled = seen(observation.moments.scaled(scale))
    assert criterion.wanted(scaled) == pytest.approx(criterion.wanted(observation), rel=1e-6, abs=1e-9)


@every_criterion
@example(one=1.0, other=1.0, noise=0.0625, signal=0.01, batch=2.0, share=1.0)  # no noise across, but for its rounding
@given(tolerances, tolerances, positive, positive, batches, shares)
def test_a_smaller_tolerance_never_asks_for_less(
    contract: Contract, one: float, other: float, noise: float, signal: float, batch: float, share: float
) -> None:
    observation = expected(noise, signal, batch=batch, share=share)
    strict, loose = contract.make(min(one, other)), contract.make(max(one, other))
    # zero or less both say that no noise was seen
    assert max(strict.wanted(observation), 0) >= max(loose.wanted(observation), 0) * (1 - 1e-12)


@every_criterion
@example(tolerance=0.01, noise=-1.0, signal=0.6, batch=2.0, share=0.5)  # both terms of a quotient below zero
@given(tolerances, st.one_of(st.just(0.0), st.floats(-1e3, -1e-3)), st.floats(-1, 1e3), batches, shares)
def test_without_noise_there_is_no_growth(
    contract: Contract, tolerance: float, noise: float, signal: float, batch: float, share: float
) -> None:
    """Estimates of a small noise come out negative; no criterion may take that for a reason to grow."""
    assert contract.make(tolerance).wanted(expected(noise, signal, batch=batch, share=share)) <= 1e-9


@every_criterion
@given(tolerances, positive, batches, shares)
def test_pure_noise(contract: Contract, tolerance: float, noise: float, batch: float, share: float) -> None:
    moments = shared(noise, 0.0, batch=batch, share=share)
    # rounding leaves a signal of the order of 1e-16 noise, on either side of zero, and a price takes the root of that
    wanted = contract.make(tolerance).wanted(seen(moments))
    asked = contract.in_noise(tolerance, batch, share)
    if math.isinf(asked):
        assert wanted > (1e6 if isinstance(contract.make(tolerance), StepPrice) else 1e9)
    else:
        assert wanted == pytest.approx(asked, rel=1e-9, abs=1e-9 * batch / tolerance**2)


@every_criterion
@given(anything, anything, anything, st.floats(1, 64), st.floats(1, 64), st.integers(1, 9), tolerances)
def test_no_measurement_raises(
    contract: Contract,
    part_sq: float,
    grad_sq: float,
    along: float,
    part_size: float,
    parts: float,
    num_parts: int,
    tolerance: float,
) -> None:
    moments = GradientMoments(part_sq, part_size, grad_sq, part_size * parts, num_parts, along, noise_at_quantile=along)
    wanted = contract.make(tolerance).wanted(seen(moments))
    assert isinstance(wanted, float)
    if math.isnan(part_sq) or math.isnan(grad_sq) or num_parts == 1:
        assert math.isnan(wanted) or more_than_noise(contract.make(tolerance))


@every_criterion
def test_zero_gradients_show_no_noise(contract: Contract) -> None:
    zero = GradientMoments(0.0, 1.0, 0.0, 8.0, 8, noise_along=0.0, noise_at_quantile=0.0)
    assert contract.make(0.5).wanted(seen(zero)) == 0


@every_criterion
def test_what_was_not_measured_is_not_a_number(contract: Contract) -> None:
    criterion = contract.make(0.5)
    assert math.isnan(criterion.wanted(seen(None)))
    if more_than_noise(criterion):
        assert math.isnan(criterion.wanted(seen(GradientMoments(2.0, 1.0, 1.0, 4.0, 4))))


@every_criterion
@with_examples(20)
@given(st.sampled_from([5e-324, 1e-300, 1e-200, 1e160, 1e200, 1.7e308]), positive, positive, batches)
def test_extreme_tolerances_do_not_raise(
    contract: Contract, tolerance: float, noise: float, signal: float, batch: float
) -> None:
    assume(math.isfinite(1 / tolerance) and math.isfinite(2 * tolerance))
    assert not contract.make(tolerance).wanted(expected(noise, signal, batch=batch)) < 0


@every_criterion
@pytest.mark.parametrize("bad", [0.0, -0.5, math.nan, math.inf])
def test_bad_tolerances_are_named(contract: Contract, bad: float) -> None:
    kind = type(contract.make(0.5))
    for name in contract.names:
        good = dict.fromkeys(contract.names, 0.5)
        with pytest.raises(ValueError, match=f"{name} must be a positive number, got {bad}"):
            kind(**{**good, name: bad})


@pytest.mark.parametrize("bad", [1, 0, -4, math.nan])
def test_bad_populations_are_named(bad: int) -> None:
    with pytest.raises((TypeError, ValueError), match=f"population must be .*got {bad}"):
        NormTest(0.5, population=bad)


def test_bad_norms_and_quantiles_are_named() -> None:
    with pytest.raises(ValueError, match="norm must be one of euclidean, adam, sign, spectral, kfac, got 'l1'"):
        NoiseScale(norm="l1")  # type: ignore[arg-type]
    for bad in (0.0, -0.1, 1.01, math.nan):
        with pytest.raises(ValueError, match=f"quantile must be above 0 and at most 1.0 .*got {bad}"):
            CoordinateNormTest(0.5, quantile=bad)
    for bad in (0.0, math.nan):
        with pytest.raises(ValueError, match=f"eta must be a positive number, got {bad}"):
            CoordinateNormTest(bad, quantile=1.0)


# --- the closed forms -----------------------------------------------------------------------------------------------


def smallest(passes: Callable[[int], bool], largest: int) -> int:
    """The smallest batch that passes, by trying; ``passes`` is monotone."""
    low, high = 1, largest
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle + 1, high)
    return low


def assert_smallest(wanted: float, passes: Callable[[int], bool]) -> None:
    """``ceil(wanted)`` is the smallest batch that passes, up to rounding."""
    found = smallest(passes, 2**50)
    assert found - 1 - 1e-9 * found <= wanted <= found + 1e-9 * found


@given(tolerances, positive, positive, batches)
def test_the_norm_test_by_trying_batches(eta: float, noise: float, signal: float, batch: float) -> None:
    observation = expected(noise, signal, batch=batch)
    assert observation.moments is not None
    grad_sq = observation.moments.grad_sq
    assert_smallest(NormTest(eta).wanted(observation), lambda b: noise / b <= eta**2 * grad_sq)


@given(tolerances, positive, positive, batches, st.integers(2, 10**6))
def test_the_finite_population_by_trying_batches(
    eta: float, noise: float, signal: float, batch: float, population: int
) -> None:
    observation = expected(noise, signal, batch=batch)
    assert observation.moments is not None
    grad_sq = observation.moments.grad_sq
    wanted = NormTest(eta, population=population).wanted(observation)
    assert wanted <= population
    assert_smallest(
        wanted, lambda b: b >= population or noise / b * (population - b) / (population - 1) <= eta**2 * grad_sq
    )
    assert wanted <= max(1, NormTest(eta).wanted(observation)) * (1 + 1e-9)


@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), tolerances, st.floats(2, 4096), st.integers(2, 10**6))
@example(noise=-1.0, signal=0.5001, eta=0.1, batch=2.0, population=1000)
def test_the_finite_population_is_never_exceeded(
    noise: float, signal: float, eta: float, batch: float, population: int
) -> None:
    wanted = NormTest(eta, population=population).wanted(expected(noise, signal, batch=batch))
    assert wanted <= population or wanted == math.inf


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), tolerances, st.floats(0.01, 1))
def test_the_coordinate_wise_test_by_trying_batches(seed: int, d: int, eta: float, quantile: float) -> None:
    rng = np.random.default_rng(seed)
    gradients = rng.standard_normal((6, d)) + rng.standard_normal(d)
    mean, variance = gradients.mean(axis=0), gradients.var(axis=0, ddof=1)
    moments = from_examples((gradients**2).sum(axis=1), gradients @ mean)
    ratio = np.quantile(variance / mean**2, quantile, method="inverted_cdf")
    wanted = CoordinateNormTest(eta, quantile).wanted(
        seen(moments._replace(noise_at_quantile=float(ratio) * moments.grad_sq))
    )
    assert_smallest(wanted, lambda b: np.mean(variance / b <= eta**2 * mean**2) >= quantile * (1 - 1e-12))


def test_a_large_population_is_the_papers_form() -> None:
    observation = expected(3.0, 0.5, batch=64)
    assert NormTest(0.3, population=10**12).wanted(observation) == pytest.approx(
        NormTest(0.3).wanted(observation), rel=1e-9
    )


@given(st.integers(0, 2**32 - 1), st.integers(3, 12), tolerances, tolerances)
def test_inner_product_and_orthogonality_by_trying_batches(seed: int, d: int, theta: float, nu: float) -> None:
    rng = np.random.default_rng(seed)
    gradients = rng.standard_normal((2 * d, d)) + rng.standard_normal(d)
    mean = gradients.mean(axis=0)
    products, grad_sq = gradients @ mean, float(mean @ mean)
    observation = seen(from_examples((gradients**2).sum(axis=1), products))
    along = float(products.var(ddof=1))
    rest = gradients - np.outer(products, mean) / grad_sq
    across = float(((rest - rest.mean(axis=0)) ** 2).sum() / (2 * d - 1))
    inner, orthogonal = InnerProductTest(theta).wanted(observation), OrthogonalityTest(nu).wanted(observation)
    assert_smallest(inner, lambda b: along / b <= theta**2 * grad_sq**2)
    assert_smallest(orthogonal, lambda b: across / b <= nu**2 * grad_sq)
    assert AugmentedInnerProductTest(theta, nu).wanted(observation) == max(inner, orthogonal)


@given(st.floats(0.05, 0.95), st.floats(1, 1e4))
def test_the_norm_test_settles_below_its_target(eta: float, noise_scale: float) -> None:
    """The plug-in gradient is longer than the true one, so the fixed point is B (1 - eta^2) / eta^2, not B / eta^2."""
    settled = noise_scale * (1 - eta**2) / eta**2
    assume(settled > 1.01)
    asked = NormTest(eta).wanted(expected(noise_scale, 1.0, batch=settled))
    assert asked == pytest.approx(settled, rel=1e-9)


@given(positive, positive, batches, st.floats(0.1, 10))
def test_the_noise_scale_does_not_depend_on_the_batch(
    noise: float, signal: float, batch: float, multiple: float
) -> None:
    asked = NoiseScale(multiple).wanted(expected(noise, signal, batch=batch))
    # the signal is a difference: its digits are those of noise / batch + signal
    assert asked == pytest.approx(multiple * noise / signal, rel=1e-14 * (1 + noise / signal))


@given(tolerances, positive, batches, shares)
def test_an_average_signal_below_nothing_is_boundless(eta: float, noise: float, batch: float, share: float) -> None:
    without_gradient = expected(noise, -2 * noise / batch, batch=batch, share=share)
    assert NormTest(eta).wanted(without_gradient) == math.inf
    assert NoiseScale().wanted(without_gradient) == math.inf


def test_a_subclass_is_asked_for_what_it_defines() -> None:
    """One that replaces the test must not be followed by the rest that it inherits."""

    class Doubled(NormTest):
        def wanted(self, observation: Observation) -> float:
            return 2 * super().wanted(observation)

    class Halved(Doubled):
        def rest(self, observation: Observation) -> float:
            return super().rest(observation) / 2

    class Renamed(NormTest):
        pass

    asked = {NormTest: "rest", Renamed: "rest", Doubled: "wanted", Halved: "rest", NoiseScale: "wanted"}
    for kind, name in asked.items():
        criterion = kind(0.5)
        assert resting_size(criterion) == getattr(criterion, name)
