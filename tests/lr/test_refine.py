"""Refined schedules against the official functions, a naive median, and the theorem they come from."""

from __future__ import annotations

import json
import lzma
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from adabatch.lr.bound import bound, bound_terms, discretize
from adabatch.lr.refine import (
    last_iterate_guarantee,
    last_iterate_multipliers,
    median_filter,
    refine,
    refined_weights,
    stretch,
    to_last_iterate,
)
from adabatch.lr.shapes import Shape, linear

Array = NDArray[np.float64]
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "lr_cases.json").read_text())["cases"]

some_norms = st.lists(st.floats(0.01, 100), min_size=2, max_size=40)
some_weights = st.lists(st.floats(0.01, 100), min_size=1, max_size=20)
KINDS = st.sampled_from(["sgd", "adam", "adagrad"])


def entries(shape: Shape) -> Array:
    return np.array(shape.settings["values"])


def slow_refine(norms: Array, power: int) -> Array:
    weights = norms ** float(-power)
    raw = np.array([weights[t] * weights[t + 1 :].sum() for t in range(len(norms))])
    return np.asarray(raw / raw.max())


def slow_median(values: Array, window: int) -> Array:
    half = window // 2
    mirrored = values[::-1][1 : half + 1]
    padded = np.concatenate([np.repeat(values[0], half), values, mirrored])
    return np.array([np.median(padded[i : i + window]) for i in range(len(values))])


@pytest.mark.parametrize("name", ["D01", "D03", "D05"])
def test_without_smoothing_it_is_the_official_closed_form(name: str) -> None:
    case = GOLDEN[name]
    norms, expected = case["inputs"]["G"], case["expected"]
    refined = entries(refine(norms, "sgd", smoothing=0.0))
    np.testing.assert_allclose(refined, expected.get("l2_normalised", expected.get("normalised")), atol=1e-10)
    raw = np.array(expected["official_raw" if name == "D01" else "l2_official_raw"])
    np.testing.assert_allclose(refined, raw / raw.max(), atol=1e-10)
    if "l1_normalised" in expected:
        np.testing.assert_allclose(entries(refine(norms, "adam", smoothing=0.0)), expected["l1_normalised"], atol=1e-10)


@pytest.mark.parametrize("name", ["D03", "D05"])
def test_theory_of_the_weights(name: str) -> None:
    """Factors, optimal weights and their guarantee, and what the last-iterate bound says of the outcome."""
    case = GOLDEN[name]
    norms, expected = np.array(case["inputs"]["G"]), case["expected"]
    inverse = norms**-2.0
    np.testing.assert_allclose(
        inverse * last_iterate_multipliers(inverse), expected["l2_theory_eta_with_w=G^-2"], rtol=1e-12
    )
    weights = refined_weights(norms, "sgd")
    best = weights / np.sqrt(np.sum((weights * norms) ** 2))  # D = 1
    np.testing.assert_allclose(best, expected["optimal_weights_D1"], rtol=1e-12)
    np.testing.assert_allclose(
        best * last_iterate_multipliers(best), expected["l2_theory_eta_with_optimal_w"], rtol=1e-12
    )
    guarantee = last_iterate_guarantee(best, norms)
    assert guarantee == pytest.approx(expected["regret_bound_at_optimal_weights"], rel=1e-12, abs=0)
    assert guarantee == pytest.approx(expected["D_over_sqrt_sum_inv_G2"], rel=1e-12, abs=0)
    rivals = {
        "refined_l2": entries(refine(norms, smoothing=0.0)),
        "linear": 1 - np.arange(1, len(norms) + 1) / len(norms),
    }
    for rival, factors in rivals.items():
        tuned = expected["last_iterate_bound_tuned"][rival]
        terms = bound_terms(factors, norms)
        assert np.count_nonzero(factors) == tuned["n_nonzero"]
        assert terms.best_base_lr == pytest.approx(tuned["gamma"], rel=1e-10, abs=0)
        assert terms.best == pytest.approx(tuned["omega"], rel=1e-10, abs=0)


@pytest.mark.parametrize("name", ["D07", "D09"])
def test_the_synthetic_norm_curves_of_the_official_script(name: str) -> None:
    case = GOLDEN[name]
    given_, expected = case["inputs"], case["expected"]
    curve = np.interp(np.linspace(0, 1, given_["n"]), given_["interp_x"], given_["interp_y"])
    offset = np.arange(-160, 161)  # 4 sigma
    kernel = np.exp(-0.5 * (offset / given_["gaussian_sigma"]) ** 2)
    norms = np.convolve(np.pad(curve, 160, mode="edge"), kernel / kernel.sum(), mode="valid")
    keys: list[tuple[Any, str, str]] = [
        ("sgd", "l2_normalised", "argmax_l2"),
        ("adam", "l1_normalised", "argmax_l1"),
    ]
    for kind, key, peak in keys:
        refined = entries(refine(norms, kind, smoothing=0.0))
        for index, value in expected["smoothed_G"].items():
            assert norms[int(index)] == pytest.approx(value, rel=1e-12, abs=0)
        for index, value in expected[key].items():
            assert refined[int(index)] == pytest.approx(value, abs=1e-10)
        assert int(np.argmax(refined)) == expected[peak]
    assert entries(refine(norms, smoothing=0.0)).mean() == pytest.approx(expected["mean_l2_normalised"], abs=1e-10)


def test_smoothing_with_spikes() -> None:
    case = GOLDEN["D11"]
    norms, expected = case["inputs"]["G"], case["expected"]
    tau = case["inputs"]["tau"]
    np.testing.assert_array_equal(median_filter(norms, expected["filter_width"]), expected["filtered"])
    np.testing.assert_allclose(entries(refine(norms, smoothing=tau)), expected["l2_normalised"], atol=1e-10)
    np.testing.assert_allclose(entries(refine(norms, "adam", smoothing=tau)), expected["l1_normalised"], atol=1e-10)


@pytest.mark.skipif("ADABATCH_DATA" not in os.environ, reason="needs the logged runs in $ADABATCH_DATA/llm_logs")
def test_norms_of_a_real_run() -> None:
    case = GOLDEN["D17"]
    logs = Path(os.environ["ADABATCH_DATA"]) / "llm_logs" / "grad_norm_runs.json.xz"
    with lzma.open(logs) as file:
        runs = {Path(run["file"]).name: run["history"]["train"] for run in json.load(file)}
    history, expected = runs[case["inputs"]["file"]], case["expected"]
    assert np.all(np.diff(history["iter"]) > 0)
    norms = history["grad_norm"]
    filtered = median_filter(norms, expected["filter_width"])
    for index, value in expected["filtered"].items():
        assert filtered[int(index)] == value
    keys: list[tuple[Any, str, str]] = [
        ("sgd", "l2_normalised", "argmax_l2"),
        ("adam", "l1_style_normalised", "argmax_l1"),
    ]
    for kind, key, peak in keys:
        refined = entries(refine(norms, kind, smoothing=case["inputs"]["tau"]))
        for index, value in expected[key].items():
            assert refined[int(index)] == pytest.approx(value, abs=1e-10)
        assert int(np.argmax(refined)) == expected[peak]


@pytest.mark.parametrize("name", ["D19", "D21"])
def test_the_numerical_minimiser_beats_the_closed_form_by_what_the_official_route_finds(name: str) -> None:
    expected = GOLDEN[name]["expected"]
    norms = np.ones(20) if name == "D19" else np.r_[np.linspace(8, 1, 8), np.ones(8), np.linspace(1, 2, 8)]
    assert bound(expected["schedule"], norms) == pytest.approx(expected["objective"], rel=1e-6, abs=0)
    refined = entries(refine(norms, smoothing=0.0))
    assert bound_terms(refined, norms).best == pytest.approx(
        expected["closed_form_refined_tuned_objective"], rel=1e-10, abs=0
    )
    straight = linear()(np.linspace(0, 1, len(norms)))
    assert bound_terms(straight, norms).best == pytest.approx(expected["linear_tuned_objective"], rel=1e-10, abs=0)


def test_a_batch_that_grew_gives_gain_times_linear_decay_in_gain() -> None:
    case = GOLDEN["B01"]
    given_, expected = case["inputs"], case["expected"]
    batches = np.array(given_["batch_sizes"])
    norms = np.sqrt(given_["true_grad_sq"] + given_["per_sample_variance"] / batches)
    refined = entries(refine(norms, smoothing=0.0))
    np.testing.assert_allclose(refined, expected["refined_normalised"], atol=1e-10)
    total = expected["cumulative_gain"][-1]
    by_gain = np.array(expected["gain"]) * (1 - np.array(expected["cumulative_gain"]) / total)
    np.testing.assert_allclose(refined, by_gain / by_gain.max(), atol=1e-10)


@given(norms=some_norms, kind=KINDS)
def test_refine_is_its_formula(norms: list[float], kind: Any) -> None:
    values = np.array(norms)
    refined = entries(refine(values, kind, smoothing=0.0))
    np.testing.assert_allclose(refined, slow_refine(values, 2 if kind == "sgd" else 1), rtol=1e-12, atol=1e-300)
    assert refined[-1] == 0.0
    assert refined.max() == 1.0


@given(norms=some_norms, kind=KINDS, smoothing=st.floats(0, 1), exponent=st.integers(-400, 400))
def test_the_scale_of_the_norms_does_not_matter(norms: list[float], kind: Any, smoothing: float, exponent: int) -> None:
    """By powers of two, which scale without rounding; the squares of these weights would leave float64."""
    values = np.array(norms)
    scaled = refine(values * 2.0**exponent, kind, smoothing=smoothing)
    np.testing.assert_allclose(entries(scaled), entries(refine(values, kind, smoothing=smoothing)), rtol=1e-12)


@given(length=st.integers(2, 50), norm=st.floats(0.1, 10), kind=KINDS, smoothing=st.floats(0, 1))
def test_constant_norms_give_linear_decay(length: int, norm: float, kind: Any, smoothing: float) -> None:
    refined = refine(np.full(length, norm), kind, smoothing=smoothing)
    np.testing.assert_allclose(entries(refined), linear()(np.linspace(0, 1, length)), atol=1e-14)


def test_one_tiny_norm_owns_the_schedule_only_without_smoothing() -> None:
    norms = np.full(100, 4.0)
    norms[60] = 0.1
    np.testing.assert_allclose(entries(refine(norms, smoothing=0.1)), np.linspace(1, 0, 100), atol=1e-14)
    alone = entries(refine(norms, smoothing=0.0))
    assert alone[60] == 1.0
    assert np.delete(alone, 60).max() < 0.05


def test_two_norms_and_another_length() -> None:
    assert entries(refine([3.0, 5.0])).tolist() == [1.0, 0.0]
    long, short = refine(np.linspace(2, 1, 101)), refine(np.linspace(2, 1, 101), length=11)
    assert entries(short).shape == (11,)
    np.testing.assert_allclose(entries(short), entries(long)[::10], rtol=1e-12)
    assert len(discretize(long, 777)) == 777


@given(norms=st.lists(st.floats(0.1, 10), min_size=3, max_size=30))
def test_the_refined_schedule_is_the_best_of_its_family(norms: list[float]) -> None:
    """Among weights, those refined have the least guarantee: no random others do better."""
    values = np.array(norms)

    def tuned(weights: Array) -> float:
        return last_iterate_guarantee(weights / np.sqrt(np.sum((weights * values) ** 2)), values)

    best = tuned(refined_weights(values))
    rng = np.random.default_rng(0)
    for spread in (0.01, 0.1, 1.0):
        assert best <= tuned(refined_weights(values) * rng.lognormal(sigma=spread, size=len(values))) * (1 + 1e-12)


@given(weights=some_weights)
def test_multipliers_are_the_share_of_weight_to_come(weights: list[float]) -> None:
    w = np.array(weights)
    slow = [w[t + 1 :].sum() / w.sum() for t in range(len(w))]
    np.testing.assert_allclose(last_iterate_multipliers(w), slow, rtol=1e-13, atol=0)
    constant = last_iterate_multipliers(np.full(len(w), w[0]))
    np.testing.assert_allclose(constant, 1 - np.arange(1, len(w) + 1) / len(w), atol=1e-14)


@given(weights=some_weights, seed=st.integers(0, 2**32 - 1))
def test_the_last_iterate_moves_by_part_of_each_move(weights: list[float], seed: int) -> None:
    z = np.random.default_rng(seed).normal(size=(len(weights), 3, 2))
    x = to_last_iterate(z, weights)
    multipliers = last_iterate_multipliers(weights)
    slow = z[0]
    for t in range(len(weights)):
        np.testing.assert_allclose(x[t], slow, atol=1e-13)
        if t + 1 < len(weights):
            slow = slow + multipliers[t] * (z[t + 1] - z[t])
    # the same iterates by another road: the average of z, weighted by w, mixed with the newest
    w = np.array(weights)
    ahead = np.append(np.cumsum(w[::-1])[::-1][1:], 0.0)
    for t in range(len(w)):
        share = (np.tensordot(w[: t + 1], z[: t + 1], axes=1) + ahead[t] * z[t]) / w.sum()
        np.testing.assert_allclose(x[t], share, atol=1e-12)


@given(weights=st.lists(st.floats(0.05, 1), min_size=2, max_size=20), seed=st.integers(0, 2**32 - 1))
def test_regret_becomes_a_guarantee_for_the_last_iterate(weights: list[float], seed: int) -> None:
    """The conversion theorem on a convex, non-smooth function, with AdaGrad and SGD as the learners."""
    rng = np.random.default_rng(seed)
    matrix, target, point = rng.normal(size=(6, 3)), rng.normal(size=6), rng.normal(size=3)
    w, multipliers = np.array(weights), last_iterate_multipliers(weights)
    for scaled in (True, False):
        x = z = np.zeros(3)
        squares, regret, norms = np.zeros(3), 0.0, []
        for t in range(len(w)):
            gradient = matrix.T @ np.sign(matrix @ x - target)
            norms.append(np.linalg.norm(gradient))
            regret += w[t] * gradient @ (z - point)
            squares += (w[t] * gradient) ** 2
            step = 0.3 / np.sqrt(squares + 1e-12) if scaled else 1.0
            loss = np.abs(matrix @ x - target).sum()
            move = -step * w[t] * gradient
            x, z = x + multipliers[t] * move, z + move
        excess = loss - np.abs(matrix @ point - target).sum()
        assert excess <= regret / w.sum() + 1e-9
        if not scaled:
            assert excess <= last_iterate_guarantee(w, norms, distance=float(np.linalg.norm(point))) + 1e-9


def test_constant_weights_guarantee_the_worst_case_optimum() -> None:
    """w = D / (G sqrt T) makes D G / sqrt T, half of what the bound of linear decay says."""
    steps = 100
    weights = np.full(steps, 2 / (3 * math.sqrt(steps)))
    assert last_iterate_guarantee(weights, 3.0, distance=2.0) == pytest.approx(0.6, rel=1e-13, abs=0)


# few different values, so that ties are the rule
@given(
    values=st.lists(st.one_of(st.integers(0, 4).map(float), st.floats(-10, 10)), min_size=1, max_size=60),
    data=st.data(),
)
def test_median_filter_is_the_naive_one(values: list[float], data: st.DataObject) -> None:
    series = np.array(values)
    window = 2 * data.draw(st.integers(0, len(values) - 1)) + 1
    np.testing.assert_array_equal(median_filter(series, window), slow_median(series, window))


@pytest.mark.parametrize("smoothing", [0.001, 0.1, 0.5])
def test_median_filter_of_a_longer_series_is_the_naive_one(smoothing: float) -> None:
    series = np.random.default_rng(0).lognormal(size=3000)
    window = 2 * (int(smoothing * 3000) // 2) + 1
    np.testing.assert_array_equal(median_filter(series, window), slow_median(series, window))


@pytest.mark.slow
def test_a_million_norms_are_fast() -> None:
    norms = np.random.default_rng(0).lognormal(size=10**6)
    begin = time.process_time()
    refine(norms, smoothing=0.1)
    assert time.process_time() - begin < 3.0


@given(
    values=st.lists(st.floats(-10, 10), min_size=1, max_size=20),
    length=st.integers(2, 40),
    inside=st.floats(0, 1),
)
def test_stretch_keeps_ends_and_lines(values: list[float], length: int, inside: float) -> None:
    out = stretch(values, length)
    assert len(out) == length
    assert (out[0], out[-1]) == (values[0], values[-1])
    assert min(values) <= out.min() <= out.max() <= max(values)
    np.testing.assert_allclose(stretch([2.0, 5.0], length), np.linspace(2, 5, length), atol=1e-14)
    np.testing.assert_allclose(stretch(values, len(values)), values, atol=1e-14)


@pytest.mark.parametrize(
    ("norms", "complaint"),
    [
        ([1.0], "at least 2 steps"),
        ([], "at least 2 steps"),
        (1.0, "at least 2 steps"),
        ([[1.0, 2.0]], "at least 2 steps"),
        ([1.0, 0.0, 2.0], "got 0.0 at 1"),
        ([1.0, 2.0, -3.0], "got -3.0 at 2"),
        ([math.nan, 2.0], "got nan at 0"),
        ([1.0, math.inf, math.inf], r"got inf at 1 \(2 such of 3\)"),
        ([1e-200, 1.0, 1.0], "beyond float64"),
        ([1.0, 1.0, 1e200], "beyond float64"),
    ],
)
def test_bad_norms_are_refused(norms: Any, complaint: str) -> None:
    for function in (refine, refined_weights):
        with pytest.raises(ValueError, match=complaint):
            function(norms, "sgd")


def test_bad_arguments_are_refused() -> None:
    for smoothing in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="smoothing"):
            refine([1.0, 2.0], smoothing=smoothing)
    with pytest.raises(ValueError, match="kind must be one of sgd, adam, adagrad, got 'lion'"):
        refine([1.0, 2.0], "lion")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="length"):
        refine([1.0, 2.0], length=1)
    for window in (0, 2, 7, -1):
        with pytest.raises(ValueError, match="window must be odd and within 1 to 5"):
            median_filter([1.0, 2.0, 3.0], window)
    with pytest.raises(ValueError, match="finite"):
        median_filter([1.0, math.nan], 1)
    with pytest.raises(ValueError, match="values must be a flat array"):
        stretch([], 3)
    for weights in ([], [0.0, 0.0], [1.0, -1.0], [1.0, math.nan], [[1.0]]):
        with pytest.raises(ValueError, match="weights"):
            last_iterate_multipliers(weights)
    with pytest.raises(ValueError, match="one weight per iterate"):
        to_last_iterate(np.zeros((3, 2)), [1.0, 1.0])
    with pytest.raises(ValueError, match="as many as the 2 weights"):
        last_iterate_guarantee([1.0, 1.0], [1.0])
    for missing in ([1.0, None], [1.0, math.nan], [1.0, -1.0]):
        with pytest.raises(ValueError, match="leave out the steps that were skipped"):
            last_iterate_guarantee([1.0, 1.0], missing)  # type: ignore[arg-type]
