"""Shapes: one contract for all, the published values of each, and what they refuse."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adabatch.lr import shapes
from adabatch.lr.shapes import (
    Shape,
    adjusted_infimum,
    constant,
    cosine,
    exp_hyperbolic,
    hyperbolic,
    inverse_sqrt,
    linear,
    piecewise,
    polynomial,
    tabulated,
    warmup_factor,
    wsd,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "lr_cases.json").read_text())["cases"]

ratio = st.floats(0, 1)
DECAYS = st.sampled_from(["linear", "1-sqrt", "exponential", "cosine"])
steps = st.lists(st.tuples(st.floats(1e-3, 1), st.floats(0.01, 10)), max_size=5, unique_by=lambda pair: pair[0])
# a new shape joins all the tests of this file in one line
SHAPES = {
    "constant": st.builds(constant),
    "linear": st.builds(linear, floor=ratio),
    "cosine": st.builds(cosine, floor=ratio),
    "wsd": st.builds(wsd, cooldown=ratio, decay=DECAYS, floor=ratio),
    "inverse_sqrt": st.builds(inverse_sqrt, timescale=st.floats(1e-6, 10), cooldown=ratio, floor=ratio),
    "polynomial": st.builds(polynomial, power=st.floats(0.1, 5), floor=ratio),
    "piecewise": steps.map(sorted).map(
        lambda pairs: piecewise(milestones=[m for m, _ in pairs], factors=[f for _, f in pairs])
    ),
    "hyperbolic": st.builds(hyperbolic, upper_bound=st.floats(1, 1e6), infimum=st.floats(0, 0.999)),
    "exp_hyperbolic": st.builds(exp_hyperbolic, upper_bound=st.floats(1, 1e6), infimum=st.floats(1e-9, 0.999)),
    "tabulated": st.lists(st.floats(0.01, 10), min_size=2, max_size=50).map(lambda v: tabulated(values=v)),
}
any_shape = st.one_of(*SHAPES.values())
progress = st.floats(0, 1)
DECAYING = [name for name in SHAPES if name not in ("piecewise", "tabulated")]
FLOORED = ["linear", "cosine", "wsd", "inverse_sqrt", "polynomial"]


def test_every_shape_is_in_the_contract() -> None:
    assert set(SHAPES) == set(shapes.FACTORIES)


@given(shape=any_shape, p=progress)
def test_a_number_gives_a_number_and_an_array_gives_the_same_numbers(shape: Shape, p: float) -> None:
    alone = shape(p)
    together = shape(np.array([[p, 1.0], [0.0, p]]))
    assert type(alone) is float
    assert together.dtype == np.float64
    assert together.shape == (2, 2)
    assert together[0, 0] == together[1, 1] == alone
    assert isinstance(shape(np.array(p)), np.ndarray)
    assert shape([p]).tolist() == [alone]


@given(shape=any_shape, p=st.floats(allow_nan=False))
def test_progress_is_clamped(shape: Shape, p: float) -> None:
    assert shape(p) == shape(min(max(p, 0.0), 1.0))


@given(shape=any_shape)
def test_progress_must_be_a_number(shape: Shape) -> None:
    with pytest.raises(ValueError, match="NaN"):
        shape(math.nan)
    with pytest.raises(ValueError, match="NaN"):
        shape(np.array([0.5, math.nan]))


@given(shape=any_shape, points=st.lists(progress, min_size=2, max_size=20))
def test_factors_are_finite_and_not_negative(shape: Shape, points: list[float]) -> None:
    factors = shape(np.array(points))
    assert np.all(np.isfinite(factors) & (factors >= 0))


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "tabulated"])
def test_the_factor_at_progress_0_is_1(name: str) -> None:
    @given(shape=SHAPES[name])
    def check(shape: Shape) -> None:
        assert shape(0.0) == 1.0

    check()


@pytest.mark.parametrize("name", DECAYING)
def test_decaying_shapes_never_rise(name: str) -> None:
    @given(shape=SHAPES[name], points=st.lists(progress, min_size=2, max_size=20))
    def check(shape: Shape, points: list[float]) -> None:
        # a few roundings of a number of at most 1
        assert np.all(np.diff(shape(np.sort(points))) <= 1e-15)

    check()


@pytest.mark.parametrize("name", FLOORED)
def test_a_floor_is_never_undercut_and_ends_the_decay(name: str) -> None:
    @given(shape=SHAPES[name], p=progress)
    def check(shape: Shape, p: float) -> None:
        floor = shape.settings["floor"]
        assert isinstance(floor, float)
        assert shape(p) >= floor * (1 - 1e-15)
        if shape.settings.get("cooldown", 1.0) != 0:
            assert shape(1.0) == floor

    check()


@given(shape=any_shape)
def test_a_shape_is_data(shape: Shape) -> None:
    through_json = Shape.from_dict(json.loads(json.dumps(shape.to_dict())))
    for twin in (through_json, pickle.loads(pickle.dumps(shape)), copy.deepcopy(shape), copy.copy(shape)):
        assert twin == shape
        assert hash(twin) == hash(shape)
        assert twin(0.37) == shape(0.37)
    assert Shape(shape.name, shape.settings) == shape
    assert shape != shape.to_dict()


@given(shape=any_shape.filter(lambda shape: shape.name != "tabulated"))
def test_repr_is_the_call_that_makes_it(shape: Shape) -> None:
    assert eval(repr(shape), dict(vars(shapes))) == shape


def test_repr_leaves_out_defaults_and_long_tables() -> None:
    assert repr(wsd(cooldown=0.2)) == "wsd(cooldown=0.2)"
    assert repr(constant()) == "constant()"
    assert repr(tabulated(values=np.linspace(1, 0, 1000).tolist())) == "tabulated(values=<1000 numbers, 1 to 0>)"


def test_shapes_with_other_settings_differ() -> None:
    distinct = {linear(), linear(floor=0.1), cosine(), polynomial(power=1), wsd(cooldown=1), constant()}
    assert len(distinct) == 6
    assert linear(floor=0) == linear()


def test_a_shape_cannot_be_changed() -> None:
    shape = wsd(cooldown=0.2)
    with pytest.raises(AttributeError, match="immutable"):
        shape.cooldown = 0.3
    with pytest.raises(AttributeError, match="immutable"):
        del shape._name
    with pytest.raises(TypeError):
        shape.settings["cooldown"] = 0.3  # type: ignore[index]


def test_a_shape_has_no_subclasses() -> None:
    with pytest.raises(TypeError, match="final"):
        type("Triangle", (Shape,), {})


@pytest.mark.parametrize(
    ("state", "complaint"),
    [
        ({"name": "triangle", "settings": {}}, "no shape 'triangle'"),
        ({"name": "wsd", "settings": {"cooldown": 0.2, "warmup": 3}}, "no setting 'warmup'"),
        ({"name": "wsd", "settings": {}}, "needs the setting 'cooldown'"),
        ({"name": "wsd", "settings": {"cooldown": 2}}, r"cooldown must lie in \[0, 1\], got 2"),
        ({"name": "wsd"}, "'name' and 'settings'"),
        ({"name": "wsd", "settings": {"cooldown": 0.2}, "lr": 1}, "'name' and 'settings'"),
    ],
)
def test_from_dict_is_strict(state: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Shape.from_dict(state)


@pytest.mark.parametrize(
    ("factory", "settings", "complaint"),
    [
        (linear, {"floor": 1.5}, "floor"),
        (linear, {"floor": -0.1}, "floor"),
        (cosine, {"floor": math.nan}, "floor"),
        (cosine, {"floor": "low"}, "floor must be a number"),
        (cosine, {"floor": True}, "floor must be a number"),
        (wsd, {"cooldown": -0.1}, "cooldown"),
        (wsd, {"cooldown": 0.2, "decay": "sqrt"}, "decay must be one of linear, 1-sqrt, exponential, cosine"),
        (inverse_sqrt, {"timescale": 0}, "timescale"),
        (inverse_sqrt, {"timescale": math.inf}, "timescale"),
        (polynomial, {"power": 0}, "power"),
        (piecewise, {"milestones": [0.5, 0.5], "factors": [1, 1]}, "increase strictly"),
        (piecewise, {"milestones": [0.0], "factors": [0.1]}, "increase strictly"),
        (piecewise, {"milestones": [0.5, 1.2], "factors": [1, 1]}, "increase strictly"),
        (piecewise, {"milestones": [0.5], "factors": []}, "one factor per milestone"),
        (piecewise, {"milestones": [0.5], "factors": [0.0]}, "factors must be positive"),
        (piecewise, {"milestones": 0.5, "factors": [0.1]}, "sequence of numbers"),
        (piecewise, {"milestones": ["a"], "factors": [0.1]}, "sequence of numbers"),
        (hyperbolic, {"upper_bound": 0.9, "infimum": 0.1}, "upper_bound must be at least max_iter"),
        (hyperbolic, {"upper_bound": 99, "max_iter": 100, "infimum": 0.1}, "at least max_iter"),
        (hyperbolic, {"upper_bound": 2, "infimum": 1.0}, "infimum learning rate"),
        (hyperbolic, {"upper_bound": 2, "infimum": 2.0}, "infimum learning rate"),
        (exp_hyperbolic, {"upper_bound": 2, "infimum": 0.0}, r"infimum must lie in \(0, 1\)"),
        (exp_hyperbolic, {"upper_bound": 2, "infimum": 1.0}, r"infimum must lie in \(0, 1\)"),
        (tabulated, {"values": [1.0]}, "at least 2 values"),
        (tabulated, {"values": [0.0, 0.0]}, "nor all zero"),
        (tabulated, {"values": [1.0, -0.1]}, "not be negative"),
        (tabulated, {"values": [1.0, math.nan]}, "finite"),
    ],
)
def test_settings_out_of_range_are_refused(factory: Any, settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises((TypeError, ValueError), match=complaint):
        factory(**settings)


def test_a_cooldown_of_nothing_and_of_everything() -> None:
    points = np.linspace(0, 1, 101)
    assert np.all(wsd(cooldown=0)(points) == 1)
    np.testing.assert_allclose(wsd(cooldown=1, floor=0.1)(points), linear(floor=0.1)(points), atol=1e-15)


@pytest.mark.parametrize("decay", ["linear", "1-sqrt", "exponential", "cosine"])
@given(cooldown=st.floats(1e-3, 1.0), floor=ratio)
def test_a_cooldown_begins_at_its_knee_without_a_jump(decay: Any, cooldown: float, floor: float) -> None:
    """At progress 1 - cooldown as floats have it, whose rounding is 1.5e-8 under a square root."""
    shape, knee = wsd(cooldown=cooldown, decay=decay, floor=floor), 1 - cooldown
    for p in (np.nextafter(knee, 0), knee):
        assert shape(float(p)) == pytest.approx(1.0, abs=1e-12)
    assert shape(1.0) == pytest.approx(floor, abs=1e-15)


@given(cooldown=st.floats(0, 1e-3, exclude_min=True))
def test_a_cooldown_shorter_than_any_step_still_ends_on_its_floor(cooldown: float) -> None:
    for decay in ("linear", "1-sqrt"):
        assert wsd(cooldown=cooldown, decay=decay, floor=0.25)(1.0) == 0.25


def test_the_knee_of_an_inverse_square_root_with_a_cooldown() -> None:
    for length in (0.1, 0.2, 1 / 3, 0.123456):
        flat = inverse_sqrt(timescale=0.1)(1 - length)
        assert inverse_sqrt(timescale=0.1, cooldown=length)(1 - length) == pytest.approx(flat, rel=1e-12)


@given(shape=any_shape, points=st.lists(progress, min_size=2, max_size=33))
def test_any_arrangement_of_numbers_gives_the_same_bits(shape: Shape, points: list[float]) -> None:
    """Alone, in a row longer than a vector register, in a strided view, and in another order."""
    row = np.array(points)
    factors = shape(row)
    assert [shape(p) for p in points] == factors.tolist()
    assert shape(np.repeat(row, 2)[::2]).tolist() == factors.tolist()
    assert shape(row[::-1]).tolist() == factors[::-1].tolist()
    assert shape(np.stack([row, row]).T).tolist() == np.stack([factors, factors]).T.tolist()


def test_milestones_are_reached_at_their_value_and_all_that_a_jump_passes_count() -> None:
    shape = piecewise(milestones=[0.25, 0.5, 0.75], factors=[0.1, 0.5, 2.0])
    assert shape(np.nextafter(0.25, 0)) == 1.0
    assert shape(0.25) == 0.1
    assert shape(0.6) == pytest.approx(0.05, rel=1e-15, abs=0)
    assert shape(0.9) == pytest.approx(0.1, rel=1e-15, abs=0)
    assert piecewise(milestones=[], factors=[])(0.5) == 1.0


def test_a_table_is_interpolated_between_its_entries_and_keeps_its_ends() -> None:
    shape = tabulated(values=[0.2, 1.0, 0.3])
    assert shape([0.0, 0.25, 0.5, 0.75, 1.0]).tolist() == pytest.approx([0.2, 0.6, 1.0, 0.65, 0.3], rel=1e-15, abs=0)
    assert shape(1.0) == 0.3


@given(left=st.floats(-12, 0).map(lambda exponent: 10**exponent))
def test_the_last_of_a_decay_keeps_its_digits(left: float) -> None:
    """Near progress 1 the textbook forms cancel; against 50 digits at the same float progress."""
    p = 1 - left
    with mpmath.workdps(50):
        r = 1 - mpmath.mpf(p)
        exact = {
            cosine(): (1 + mpmath.cos(mpmath.pi * mpmath.mpf(p))) / 2,
            wsd(cooldown=1, decay="1-sqrt"): 1 - mpmath.sqrt(1 - r),
            wsd(cooldown=1, decay="cosine"): mpmath.sin(mpmath.pi * r / 2) ** 2,
            wsd(cooldown=1, decay="exponential"): 2 * mpmath.mpf("0.5") ** (1 - r) - 1,
            polynomial(power=2): r**2,
            hyperbolic(upper_bound=1, infimum=0): r,
        }
        for shape, value in exact.items():
            assert shape(p) == pytest.approx(float(value), rel=1e-14, abs=0)


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_warmup_factor_ramps_and_stays(floor: float) -> None:
    assert warmup_factor(0.0, floor) == floor
    assert warmup_factor(1.0, floor) == warmup_factor(7.0, floor) == 1.0
    np.testing.assert_allclose(
        warmup_factor(np.array([-1, 0.25, 0.5]), floor), [floor, floor + (1 - floor) / 4, (1 + floor) / 2]
    )
    assert warmup_factor(0.5, 3.0) == 2.0


@pytest.mark.parametrize("start", [-0.1, math.nan, math.inf])
def test_warmup_factor_refuses(start: float) -> None:
    with pytest.raises(ValueError, match="start"):
        warmup_factor(0.5, start)
    with pytest.raises(ValueError, match="fraction"):
        warmup_factor(math.nan)


def factor_after(shape: Shape, consumed: float, total: float, warmup: float, start: float) -> float:
    """Warm-up and shape composed as the head of the module says."""
    if consumed < warmup:
        return warmup_factor(consumed / warmup, start) * shape(0.0)
    return shape((consumed - warmup) / (total - warmup))


@pytest.mark.parametrize("case", [f"H{n:02}" for n in (1, 3, 5, 7, 9, 11, 13, 15, 17)])
def test_hyperbolic_learning_rates_are_those_of_the_published_classes(case: str) -> None:
    given_, expected = GOLDEN[case]["inputs"], GOLDEN[case]["expected"]
    warmup, length, base = given_["warmup_epochs"], given_["max_iter"], given_["init_lr"]
    infimum = given_["infimum_lr"] / base
    factory = {"hyperbolic": hyperbolic, "exp_hyperbolic": exp_hyperbolic}[given_["class"]]
    shape = factory(upper_bound=given_["upper_bound"], max_iter=length - warmup, infimum=infimum)
    for k, rate in expected["lr_after_k_steps"].items():
        if warmup and int(k) == 0:
            continue  # the published class runs its first epoch at the peak, before the warm-up
        tolerance = 1e-6 if int(k) == length else 1e-12
        assert base * factor_after(shape, int(k), length, warmup, infimum) == pytest.approx(rate, rel=tolerance, abs=0)
    assert base * shape(1.0) == pytest.approx(expected["final_lr_closed_form"], rel=1e-12, abs=0)


def test_hyperbolic_beyond_the_end_stays_there_where_the_published_class_crashes() -> None:
    assert GOLDEN["H19"]["expected"]["step N+1"].startswith("ValueError: math domain error")
    shape = hyperbolic(upper_bound=250, max_iter=50, infimum=1e-4)
    assert shape(51 / 50) == shape(1.0)
    assert GOLDEN["H19"]["expected"]["U==N ok"] == "ok, last lr 1.000000e-06"
    assert 1e-2 * hyperbolic(upper_bound=1, infimum=1e-4)(1.0) == pytest.approx(1e-6, rel=1e-12, abs=0)


@given(st.floats(1e-6, 0.5), st.floats(1e-4, 0.9), st.floats(1, 10), ratio)
def test_an_adjusted_infimum_is_that_of_the_published_helper(low: float, end: float, u: float, weight: float) -> None:
    """Its own terms: logarithms to base 10 at a base learning rate of 0.01, and weights m and n."""
    log_start, m, n = -2.0, weight, 1 - weight
    new = (m * log_start + n * (math.log10(low) + log_start)) / (m + n) + m / (m + n) * u * math.log10(end)
    found = adjusted_infimum(low, end, upper_bound=50 * u, max_iter=50, weight=weight)
    assert math.log10(found) == pytest.approx(new - log_start, rel=1e-9, abs=1e-9)
    assert adjusted_infimum(low, end, upper_bound=u, weight=0) == pytest.approx(low, rel=1e-12)


@pytest.mark.parametrize("bad", [0.0, 1.0, -0.1, math.nan])
def test_an_infimum_cannot_be_adjusted_to_nothing(bad: float) -> None:
    with pytest.raises(ValueError, match="last must lie in"):
        adjusted_infimum(1e-4, bad, upper_bound=5)
    with pytest.raises(ValueError, match="infimum must lie in"):
        adjusted_infimum(bad, 0.1, upper_bound=5)


MEGATRON = {
    "linear": lambda floor: linear(floor=floor),
    "cosine": lambda floor: cosine(floor=floor),
    "WSD:linear": lambda floor: wsd(cooldown=704 / 3264, floor=floor),
    "WSD:minus_sqrt": lambda floor: wsd(cooldown=704 / 3264, decay="1-sqrt", floor=floor),
    "WSD:exponential": lambda floor: wsd(cooldown=704 / 3264, decay="exponential", floor=floor),
    "inverse-square-root": lambda floor: inverse_sqrt(timescale=256 / 3264, floor=floor),
}


@pytest.mark.parametrize("name", MEGATRON)
def test_learning_rates_by_examples_are_those_of_megatron(name: str) -> None:
    case = GOLDEN["B03"]
    peak, warmup, total = (case["inputs"][k] for k in ("max_lr", "warmup_samples", "decay_samples"))
    shape = MEGATRON[name](case["inputs"]["min_lr"] / peak)
    for update, rate in case["expected"]["lr"][name].items():
        consumed = case["expected"]["consumed_before_update"][update]
        assert peak * factor_after(shape, consumed, total, warmup, 0.0) == pytest.approx(rate, abs=1e-12)


@pytest.mark.parametrize(
    ("run", "base", "total", "first", "shape"),
    [
        ("wsd_50k", 1e-3, 50_000, 300, wsd(cooldown=10_000 / 49_700)),
        ("wsd_sqrt_50k", 2e-3, 50_000, 300, wsd(cooldown=10_000 / 49_700, decay="1-sqrt")),
        # torch's OneCycleLR: its peak and its end are one step early, and past its end it rises again
        ("cosine_50k", 1e-3, 49_999, 299, cosine(floor=1e-4)),
    ],
)
def test_learning_rates_are_those_that_real_runs_logged(
    run: str, base: float, total: int, first: int, shape: Shape
) -> None:
    for step, rate in GOLDEN["S23"]["expected"][run].items():
        if run == "cosine_50k" and not first <= int(step) <= total:
            continue  # its warm-up is a cosine
        assert base * factor_after(shape, int(step), total, first, 0.01) == pytest.approx(rate, abs=1e-12)
