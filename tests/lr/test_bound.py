"""The last-iterate bound against its triple sum, 50 digits, the official package and real descents."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from adabatch.lr.bound import (
    BoundTerms,
    Extension,
    averaged_bound_terms,
    best_base_lr,
    bound,
    bound_terms,
    discretize,
    linear_cooldown_limits,
    longer_cooldown,
    transfer,
    two_stage,
)
from adabatch.lr.shapes import (
    Shape,
    constant,
    cosine,
    hyperbolic,
    inverse_sqrt,
    linear,
    piecewise,
    polynomial,
    tabulated,
    wsd,
)

Array = NDArray[np.float64]
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "lr_cases.json").read_text())["cases"]

# exact zeros or well away from the end of the float range: squares of smaller numbers vanish
factor = st.one_of(st.just(0.0), st.floats(1e-3, 10))
schedules = st.lists(factor, min_size=1, max_size=25).filter(lambda values: values[-1] > 0)


def triple_sum(eta: Array, norms: Array, distance: float) -> float:
    """The bound as Theorem 10 writes it; all factors positive."""
    steps, cost = len(eta), eta**2 * norms**2
    total = distance**2 / (2 * eta.sum()) + cost.sum() / (2 * eta.sum())
    for k in range(steps - 1):
        total += eta[k] / eta[k + 1 :].sum() * cost[k:].sum() / eta[k:].sum() / 2
    return float(total)


def in_50_digits(eta: Array, norms: Array, distance: float) -> tuple[Any, Any]:
    """T1 and T2 of the telescoped form, from the same float factors."""
    with mpmath.workdps(50):
        exact = [mpmath.mpf(value) for value in eta.tolist()]
        tail, cost = mpmath.mpf(0), mpmath.mpf(0)
        for index in range(len(exact) - 1, -1, -1):
            after = tail if tail > 0 else exact[index]
            tail += exact[index]
            cost += exact[index] ** 2 * mpmath.mpf(norms[index]) ** 2 / after
        return mpmath.mpf(distance) ** 2 / (2 * tail), cost / 2


def whole(cooldown: float, num_steps: int) -> float:
    """The official package's cooldown: whole entries of num_steps + 1, as a share of num_steps."""
    return min(int(cooldown * (num_steps + 1)), num_steps) / num_steps


def official_factors(case: dict[str, Any]) -> Array:
    given_ = case["inputs"]
    steps = given_["T"]
    kind = given_["schedule"]
    if kind == "wsd":
        warmup = given_.get("warmup_steps", 0)
        share = whole(given_["cooldown_fraction"], steps) * steps / (steps - warmup)
        start = given_.get("warmup_lr_ratio", 0.0)
        return discretize(wsd(cooldown=share), steps, warmup_steps=warmup, warmup_start=start)
    if kind == "cosine":
        return discretize(cosine(floor=given_["final_lr_ratio"]), steps)
    if kind == "sqrt":
        cooldown = whole(given_["cooldown_fraction"], steps)
        return discretize(inverse_sqrt(timescale=1 / steps, cooldown=cooldown), steps)
    if kind == "poly_backward":
        return discretize(polynomial(power=given_["alpha"]), steps)
    assert kind == "two_stage_wsd"
    jump = piecewise(milestones=[given_["milestone_0based"] / steps], factors=[given_["rho"]])
    return discretize(jump, steps) * discretize(wsd(cooldown=given_["cooldown_fraction"]), steps)


OFFICIAL = ["S01", "S03", "S05", "S07", "S09", "S11", "S13", "S15", "S17"]


@pytest.mark.parametrize("name", OFFICIAL)
def test_factors_are_those_of_the_official_package(name: str) -> None:
    factors = official_factors(GOLDEN[name])
    for index, value in GOLDEN[name]["expected"]["eta_unit_base_lr_at_1based_index"].items():
        if int(index) <= len(factors):  # the package lists the zero after the last step too
            assert factors[int(index) - 1] == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("name", OFFICIAL)
def test_bound_is_that_of_the_official_package_and_of_50_digits(name: str) -> None:
    case = GOLDEN[name]
    expected, steps = case["expected"], case["inputs"]["T"]
    norms = 1 / np.arange(1, steps + 1) if name == "S11" else case["inputs"]["G"]
    terms = bound_terms(official_factors(case), norms, distance=case["inputs"]["D"])
    assert terms.distance == pytest.approx(expected["exact_T1_base1"], rel=1e-10, abs=0)
    assert terms.gradient == pytest.approx(expected["exact_T2_base1"], rel=1e-10, abs=0)
    assert terms.best_base_lr == pytest.approx(expected["exact_gamma_star"], rel=1e-10, abs=0)
    assert terms.best == pytest.approx(expected["exact_omega_star"], rel=1e-10, abs=0)
    # the official code subtracts cumulative sums: 1.1e-6 is what it is off by in the longest of these cases
    tolerance = max(1e-6, 1.1 * expected["official_vs_exact_relative_gap"])
    assert terms.best_base_lr == pytest.approx(expected["official_gamma_star"], rel=tolerance, abs=0)
    assert terms.best == pytest.approx(expected["official_omega_star"], rel=tolerance, abs=0)
    assert terms.distance == pytest.approx(expected["official_term1_base1"], rel=1e-6, abs=0)
    official_gradient = expected["official_term2_base1"] + expected["official_term3_base1"]
    assert terms.gradient == pytest.approx(official_gradient, rel=2.2 * tolerance, abs=0)


def test_the_extended_run_of_the_official_package() -> None:
    assert best_base_lr(discretize(wsd(cooldown=0.2), 4000)) == pytest.approx(
        GOLDEN["S17"]["expected"]["gamma_star_of_original_horizon"], rel=1e-6, abs=0
    )


@pytest.mark.parametrize(
    ("name", "shape"), [("wsd_c0.2", wsd(cooldown=0.2)), ("cosine", cosine()), ("linear", linear())]
)
def test_averaged_bound_is_that_of_the_official_package(name: str, shape: Shape) -> None:
    expected = GOLDEN["S19"]["expected"][name]
    factors = discretize(shape, 400)
    terms = averaged_bound_terms(factors)
    assert terms.best_base_lr == pytest.approx(expected["gamma_star"], rel=1e-10, abs=0)
    assert terms.best == pytest.approx(expected["omega_star"], rel=1e-10, abs=0)
    assert terms.best_base_lr == pytest.approx(1 / math.sqrt(np.sum(factors**2)), rel=1e-13, abs=0)


@pytest.mark.parametrize("key", GOLDEN["S21"]["expected"])
def test_best_base_lr_over_cooldowns_is_that_of_the_official_package(key: str) -> None:
    horizon, decay = key.split(",")
    steps = int(horizon.removeprefix("T="))
    for fraction, (best, value) in GOLDEN["S21"]["expected"][key].items():
        shape = wsd(cooldown=whole(float(fraction), steps), decay="linear" if decay == "linear" else "1-sqrt")
        terms = bound_terms(discretize(shape, steps))
        assert terms.best_base_lr == pytest.approx(best, rel=1e-6, abs=0)
        assert terms.best == pytest.approx(value, rel=1e-6, abs=0)


@given(
    eta=st.lists(st.floats(1e-3, 10), min_size=1, max_size=25),
    distance=st.floats(0.1, 10),
    base_lr=st.floats(1e-3, 10),
    seed=st.integers(0, 2**32 - 1),
)
def test_bound_is_the_triple_sum(eta: list[float], distance: float, base_lr: float, seed: int) -> None:
    norms = np.random.default_rng(seed).uniform(0.1, 10, len(eta))
    slow = triple_sum(base_lr * np.array(eta), norms, distance)
    assert bound(eta, norms, base_lr=base_lr, distance=distance) == pytest.approx(slow, rel=1e-12, abs=0)


@given(eta=schedules, seed=st.integers(0, 2**32 - 1))
def test_terms_are_those_of_50_digits_with_zeros_inside(eta: list[float], seed: int) -> None:
    norms = np.random.default_rng(seed).uniform(0.1, 10, len(eta))
    exact = in_50_digits(np.array(eta), norms, 1.0)
    assert bound_terms(eta, norms) == pytest.approx(tuple(map(float, exact)), rel=1e-13, abs=0)


@pytest.mark.parametrize(
    "shape", [linear(), cosine(), wsd(cooldown=0.2), wsd(cooldown=0.3, decay="1-sqrt"), polynomial(power=3)]
)
def test_long_schedules_keep_their_digits(shape: Shape) -> None:
    """Factors of the last steps are tiny: 1e-8 to 1e-12 of the sum before them."""
    factors = discretize(shape, 10_000)
    norms = np.random.default_rng(0).lognormal(size=10_000)
    first, second = in_50_digits(factors, norms, 1.0)
    terms = bound_terms(factors, norms)
    with mpmath.workdps(50):
        assert terms.best_base_lr == pytest.approx(float(mpmath.sqrt(first / second)), rel=1e-12, abs=0)
        assert terms.best == pytest.approx(float(2 * mpmath.sqrt(first * second)), rel=1e-12, abs=0)


def test_a_million_steps_in_closed_form() -> None:
    """Constant: T2 = (1 + H_{T-1}) / 2. Linear decay, eta = m / T: T2 = (T - 1/2 + H_{T-1}) / T."""
    steps = 10**6
    harmonic = float(mpmath.harmonic(steps - 1))
    flat, falling = bound_terms(np.ones(steps)), bound_terms(discretize(linear(), steps))
    assert flat == pytest.approx((1 / (2 * steps), (1 + harmonic) / 2), rel=1e-12, abs=0)
    # T2 = 1/2 (1/T + sum_{m=2}^T 2 m / ((m - 1) T)); the last factor carries a rounding of 1e-10
    exact = (1 / (steps + 1), (steps - 0.5 + harmonic) / steps)
    assert falling == pytest.approx(exact, rel=1e-10, abs=0)


def test_a_million_steps_are_fast() -> None:
    factors, norms = discretize(cosine(), 10**6), np.random.default_rng(0).lognormal(size=10**6)
    times = []
    for _ in range(3):
        begin = time.process_time()
        bound_terms(factors, norms)
        times.append(time.process_time() - begin)
    assert min(times) < 0.3


@given(terms=st.builds(BoundTerms, st.floats(1e-6, 1e6), st.floats(1e-6, 1e6)), ratio=st.floats(0.01, 100))
def test_no_base_lr_is_better_than_the_best(terms: BoundTerms, ratio: float) -> None:
    assert terms.at(terms.best_base_lr) == pytest.approx(terms.best, rel=1e-14, abs=0)
    assert terms.at(ratio * terms.best_base_lr) >= terms.best * (1 - 1e-14)


@given(eta=schedules, size=st.floats(0.01, 100), distance=st.floats(0.01, 100), scale=st.floats(0.01, 100))
def test_best_scales_with_distance_gradients_and_factors(
    eta: list[float], size: float, distance: float, scale: float
) -> None:
    unit = bound_terms(eta)
    scaled = bound_terms(scale * np.array(eta), size, distance=distance)
    assert scaled.best_base_lr == pytest.approx(unit.best_base_lr * distance / size / scale, rel=1e-12, abs=0)
    assert scaled.best == pytest.approx(unit.best * distance * size, rel=1e-12, abs=0)


@given(eta=schedules, zeros=st.integers(1, 5))
def test_zeros_at_the_end_are_left_off(eta: list[float], zeros: int) -> None:
    padded = np.append(eta, np.zeros(zeros))
    norms = np.arange(1, len(padded) + 1)
    assert bound_terms(padded, norms) == bound_terms(eta, norms[: len(eta)])


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([constant(), linear(), cosine(), wsd(cooldown=0.3), hyperbolic(upper_bound=2, infimum=0.1)]),
    base_lr=st.floats(0.01, 1),
)
def test_a_real_descent_keeps_to_the_bound(seed: int, shape: Shape, base_lr: float) -> None:
    """Subgradients of a convex, non-smooth function with a known minimiser; no noise, so no expectation."""
    rng = np.random.default_rng(seed)
    matrix, minimiser = rng.normal(size=(8, 4)), rng.normal(size=4)
    x, norms, factors = np.zeros(4), [], discretize(shape, 30)
    for eta in factors:
        residual = matrix @ (x - minimiser)
        gradient = matrix.T @ np.sign(residual)
        norms.append(np.linalg.norm(gradient))
        loss = np.abs(residual).sum()  # of x_t, before step t
        x = x - base_lr * eta * gradient
    promised = bound(factors, norms, base_lr=base_lr, distance=float(np.linalg.norm(minimiser)))
    assert loss <= promised


@pytest.mark.parametrize("steps", [2, 17, 400])
def test_constant_schedule_in_closed_form(steps: int) -> None:
    harmonic = sum(1 / n for n in range(1, steps))
    terms = bound_terms(discretize(constant(), steps), 3.0, distance=2.0)
    assert terms.best_base_lr == pytest.approx(2 / 3 / math.sqrt(steps * (1 + harmonic)), rel=1e-13, abs=0)
    assert terms.best == pytest.approx(6 / math.sqrt(steps) * math.sqrt(1 + harmonic), rel=1e-13, abs=0)


@given(steps=st.integers(20, 2000), cooldown=st.floats(0.05, 0.9))
def test_wsd_keeps_to_its_theorem(steps: int, cooldown: float) -> None:
    """The closed upper bound of Schaipp et al. for a linear cooldown from step ``full``, with D = G = 1."""
    full = steps + 1 - max(2, int(cooldown * (steps + 1)))
    total, length = steps + full, steps - full

    def harmonic(n: int) -> float:
        return sum(1 / k for k in range(1, n + 1))

    inner = (
        2 / 3
        + (steps + 2 * full) / (3 * total)
        + harmonic(total - 2)
        - harmonic(length + 1)
        - length * (full - 1) / (3 * (length + 2) * total)
        + 1 / length**2
        + harmonic(length - 1) / (length + 1)
    )
    shape = wsd(cooldown=(steps + 1 - full) / steps)
    assert bound_terms(discretize(shape, steps)).best <= math.sqrt(4 / total * inner)


# the digest's table of the limits, to the digits it prints
LIMITS = {
    0.05: (0.4256, 2.410),
    0.1: (0.4614, 2.281),
    0.2: (0.5145, 2.160),
    0.3: (0.5613, 2.096),
    0.4: (0.6076, 2.057),
    0.5: (0.6560, 2.033),
    0.6: (0.7083, 2.017),
    0.8: (0.8324, 2.002),
    1.0: (1.0, 2.0),
}


@pytest.mark.parametrize("cooldown", LIMITS)
def test_limits_of_a_linear_cooldown(cooldown: float) -> None:
    limits = linear_cooldown_limits(cooldown)
    best, value = LIMITS[cooldown]
    assert limits.best_base_lr == pytest.approx(best, abs=5.1e-5)
    assert limits.bound == pytest.approx(value, abs=5.1e-4)
    errors = []
    for steps in (20_000, 80_000):
        terms = bound_terms(discretize(wsd(cooldown=cooldown), steps))
        assert terms.best * math.sqrt(steps) == pytest.approx(limits.bound, rel=1.3e-3, abs=0)
        errors.append(abs(terms.best_base_lr * math.sqrt(steps) / limits.best_base_lr - 1))
    assert errors[0] < (6e-4 if cooldown >= 0.2 else 1.3e-3)
    # the sums differ from the integrals by terms of order log(T) / T at most
    assert errors[1] < 0.3 * errors[0]


def test_no_stable_schedule_has_no_limit() -> None:
    for cooldown in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="cooldown"):
            linear_cooldown_limits(cooldown)


def test_transfer_between_shapes_is_the_ratio_of_their_best() -> None:
    expected = GOLDEN["S21"]["expected"]["T=400,linear"]
    moved = transfer(1e-3, wsd(cooldown=0.2), linear(), num_steps=400)
    assert moved == pytest.approx(1e-3 * expected["1.0"][0] / expected["0.2"][0], rel=1e-6, abs=0)
    limit = linear_cooldown_limits(1.0).best_base_lr / linear_cooldown_limits(0.2).best_base_lr
    assert transfer(1e-3, wsd(cooldown=0.2), linear(), num_steps=20_000) == pytest.approx(1e-3 * limit, rel=1e-3, abs=0)


def test_transfer_to_a_longer_run_falls_with_the_root_of_its_length() -> None:
    longer = transfer(1e-3, cosine(), cosine(), num_steps=5_000, target_steps=20_000)
    assert longer == pytest.approx(0.5e-3, rel=1e-3, abs=0)


@given(
    middle=st.sampled_from([linear(), wsd(cooldown=0.1), inverse_sqrt(timescale=0.1)]),
    steps=st.integers(20, 200),
    warmup=st.integers(0, 19),
)
def test_transfer_composes_and_returns(middle: Shape, steps: int, warmup: int) -> None:
    profile = np.linspace(2, 1, 13)
    first, last = cosine(), wsd(cooldown=0.3, decay="1-sqrt")
    there = transfer(0.1, first, middle, num_steps=100, target_steps=steps, norms=profile, target_warmup_steps=warmup)
    back: dict[str, Any] = {"norms": profile, "warmup_steps": warmup, "target_warmup_steps": 0}
    assert transfer(there, middle, first, num_steps=steps, target_steps=100, **back) == pytest.approx(
        0.1, rel=1e-12, abs=0
    )
    direct = transfer(0.1, first, last, num_steps=100, norms=profile)
    assert transfer(there, middle, last, num_steps=steps, target_steps=100, **back) == pytest.approx(
        direct, rel=1e-12, abs=0
    )


def test_transfer_reads_the_gradient_norms() -> None:
    """Norms that fall as 1 / t make all best base learning rates alike (S11's profile)."""
    falling = 1 / np.arange(1, 401)
    assert transfer(1.0, wsd(cooldown=0.2), linear(), num_steps=400, norms=falling) == pytest.approx(1, abs=0.01)
    assert transfer(1.0, wsd(cooldown=0.2), linear(), num_steps=400) == pytest.approx(1.953, abs=0.001)


# T1 / T0 of the extension -> the factor to four digits, and the cooldown that the official script picks
EXTENSIONS = {
    1.5: (0.6367, 0.4375),
    2.0: (0.5330, 0.634),
    2.5: (0.4727, 0.775),
    3.0: (0.4312, 0.8875),
    3.5: (0.4000, 0.972),
    4.0: (0.3754, 1.0),
}


@pytest.mark.parametrize("stretch", EXTENSIONS)
def test_extensions_are_those_of_the_official_script(stretch: float) -> None:
    factor, cooldown = EXTENSIONS[stretch]
    new_steps = int(4000 * stretch)
    stages = two_stage(4000, new_steps, cooldown=0.2)
    assert stages.lr_factor == pytest.approx(factor, abs=5.1e-5)
    assert stages.resume_step == 3200
    longer = longer_cooldown(4000, new_steps, cooldown=0.2)
    assert longer.cooldown == pytest.approx(cooldown, abs=0.9 / 32)  # the grid's spacing
    assert longer.lr_factor == 1.0


def factors_of(extension: Extension, finished: Array) -> Array:
    """The whole longer run: what the finished one did up to the checkpoint, then what is recommended."""
    rest = discretize(
        extension.shape,
        extension.num_steps,
        warmup_steps=extension.ramp_steps,
        warmup_start=1 / extension.lr_factor,
    )
    return np.append(finished[: extension.resume_step], extension.lr_factor * rest)


Maker = Callable[..., Extension]


@pytest.mark.parametrize("maker", [two_stage, longer_cooldown])
@given(
    steps=st.integers(100, 400),
    stretch=st.floats(1.3, 3),
    cooldown=st.floats(0.05, 0.5),
    warmup=st.integers(0, 40),
    decay=st.sampled_from(["linear", "1-sqrt"]),
)
def test_what_an_extension_recommends_fits_the_tuned_base_lr(
    maker: Maker, steps: int, stretch: float, cooldown: float, warmup: int, decay: Any
) -> None:
    new_steps = int(stretch * steps)
    shape = wsd(cooldown=cooldown, decay=decay)
    finished = discretize(shape, steps, warmup_steps=warmup)
    extension = maker(steps, new_steps, cooldown=cooldown, decay=decay, warmup_steps=warmup)
    longer = factors_of(extension, finished)
    assert extension.resume_step + extension.num_steps == len(longer) == new_steps
    # the checkpoint was made before any decay, unless it is the very start
    assert np.all(finished[min(warmup, extension.resume_step) : extension.resume_step] == 1)
    assert bound_terms(longer) == pytest.approx(extension.terms, rel=1e-9, abs=0)
    assert best_base_lr(longer) / best_base_lr(finished) == pytest.approx(extension.best_base_lr_ratio, rel=1e-9, abs=0)
    if maker is two_stage or extension.cooldown < 1:
        assert extension.best_base_lr_ratio == pytest.approx(1, rel=1e-9, abs=0)
    same = bound_terms(discretize(shape, new_steps, warmup_steps=warmup))
    assert extension.terms.at(best_base_lr(finished)) < same.at(best_base_lr(finished))


@given(steps=st.integers(100, 400), stretch=st.floats(1.5, 3), ramp=st.integers(1, 30))
def test_the_second_stage_fits_with_its_ramp(steps: int, stretch: float, ramp: int) -> None:
    finished = discretize(wsd(cooldown=0.2), steps)
    longer = factors_of(two_stage(steps, int(stretch * steps), cooldown=0.2, ramp_steps=ramp), finished)
    assert best_base_lr(longer) == pytest.approx(best_base_lr(finished), rel=1e-9, abs=0)


def test_a_ramp_into_the_second_stage() -> None:
    """A real run of 50,000 steps, extended to 100,000 by a factor of 0.525 that came in over 1,000."""
    extension = two_stage(50_000, 100_000, cooldown=0.2, ramp_steps=1000)
    assert extension.resume_step == 40_000
    assert extension.lr_factor == pytest.approx(0.525, abs=0.01)
    rates = 1e-3 * factors_of(extension._replace(lr_factor=0.525), np.ones(50_000))
    for step, rate in GOLDEN["S23"]["expected"]["two_stage_100k"].items():
        if int(step) < 100_000:
            assert rates[int(step)] == pytest.approx(rate, abs=1e-12)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"num_steps": 100, "new_steps": 100, "cooldown": 0.2}, "num_steps < new_steps"),
        (
            {"num_steps": 100, "new_steps": 200, "cooldown": 0.2, "warmup_steps": 100},
            "warmup_steps < num_steps",
        ),
        ({"num_steps": 100, "new_steps": 200, "cooldown": 0.0}, "cooldown"),
        ({"num_steps": 100, "new_steps": 200, "cooldown": 1.0}, "cooldown"),
    ],
)
def test_extensions_refuse(arguments: dict[str, Any], complaint: str) -> None:
    for maker in (two_stage, longer_cooldown):
        with pytest.raises(ValueError, match=complaint):
            maker(**arguments)


def test_a_ramp_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ramp_steps must lie in \[0, 8\], got 50"):
        two_stage(100, 110, cooldown=0.2, ramp_steps=50)


def test_a_cooldown_between_whole_steps_is_not_rounded() -> None:
    assert int(0.29 * 100) == 28  # what rounding down would make of it
    factors = discretize(wsd(cooldown=0.29), 100)
    assert np.count_nonzero(factors < 1) == 28  # and the zero after the last is the 29th
    assert factors[-1] == pytest.approx(1 / 29, rel=1e-13, abs=0)


def test_warmup_is_followed_by_the_shape_over_what_remains() -> None:
    factors = discretize(linear(), 12, warmup_steps=4, warmup_start=0.2)
    np.testing.assert_allclose(factors[:5], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-15)
    np.testing.assert_array_equal(factors[4:], discretize(linear(), 8))
    table = tabulated(values=[0.5, 1.0, 0.0])
    np.testing.assert_allclose(discretize(table, 12, warmup_steps=4)[:5], [0, 0.125, 0.25, 0.375, 0.5])


@pytest.mark.parametrize("warmup", [-1, 10, 11])
def test_a_run_shorter_than_its_warmup_is_refused(warmup: int) -> None:
    with pytest.raises(ValueError, match=r"warmup_steps must lie in \[0, 9\] for 10 steps"):
        discretize(linear(), 10, warmup_steps=warmup)
    with pytest.raises(ValueError, match="at least 1 step"):
        discretize(linear(), 0)


@pytest.mark.parametrize(
    ("factors", "norms", "distance", "complaint"),
    [
        ([], 1.0, 1.0, "positive factor"),
        ([0.0, 0.0], 1.0, 1.0, "positive factor"),
        ([1.0, -1.0], 1.0, 1.0, "not negative"),
        ([1.0, math.nan], 1.0, 1.0, "finite"),
        ([1.0, math.inf], 1.0, 1.0, "finite"),
        ([[1.0]], 1.0, 1.0, "flat"),
        ([1.0, 1.0], [1.0], 1.0, "as many as the 2 factors"),
        ([1.0, 1.0], [1.0, math.inf], 1.0, "norms must be finite"),
        ([1.0, 1.0], [1.0, math.nan], 1.0, "norms must be finite"),
        ([1.0, 1.0], -1.0, 1.0, "norms must be finite and not negative"),
        ([1.0, 1.0], 0.0, 1.0, "gradient term"),
        ([0.0, 1.0], [1.0, 0.0], 1.0, "gradient term"),
        ([1.0, 1.0], 1.0, 0.0, "distance"),
        ([1.0, 1.0], 1.0, math.nan, "distance"),
    ],
)
def test_bounds_refuse(factors: Any, norms: Any, distance: float, complaint: str) -> None:
    for terms in (bound_terms, averaged_bound_terms):
        with pytest.raises(ValueError, match=complaint):
            terms(factors, norms, distance=distance)


@pytest.mark.parametrize("base_lr", [0.0, -1.0, math.nan, math.inf])
def test_a_base_lr_must_be_positive(base_lr: float) -> None:
    with pytest.raises(ValueError, match="base_lr"):
        bound([1.0], base_lr=base_lr)
    with pytest.raises(ValueError, match="base_lr"):
        transfer(base_lr, linear(), cosine(), num_steps=10)
