"""What the batch makes of an update, in numbers: one progress, floors of the betas, one count for two corrections."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adabatch.batch.plan import Progress
from adabatch.lr.follow import FORGOTTEN, Followers, UpdateRules
from adabatch.lr.rules import gain, lr_factor

BETAS = {"betas": (0.9, 0.999)}
LATE = Progress(examples=10**6, steps=10**4)

ratios = st.floats(0.01, 1e4)
beta = st.floats(0.0, 0.9999)
floor = st.floats(0.0, 1.0)


def at(size: float, *, follow: Any = ("betas",), progress: Progress = LATE, rule: Any = "sqrt", **known: float) -> Any:
    return UpdateRules(rule, Followers.of(follow)).at(size, progress, reference=16, **known)


def test_the_batch_that_made_a_sign_method_of_adam_stops_at_the_floors() -> None:
    scaling = at(1024)
    assert scaling.settings(BETAS)["betas"] == pytest.approx((0.5, 0.95), rel=1e-12)
    assert scaling.binding_floors([BETAS]) == {"beta1": 0.5, "beta2": 0.95}
    without = at(1024, follow=Followers(("betas",), beta1_floor=0, beta2_floor=0))
    assert without.settings({"betas": (0.9, 0.95)})["betas"] == pytest.approx((0.0012, 0.0375), rel=0.02)
    assert without.binding_floors([BETAS]) == {}


def test_a_floor_is_never_above_the_users_own_value() -> None:
    for betas in ((0.9, 0.9), (0.3, 0.999), (0.0, 0.5), (0.9, 0.95)):
        for new, own in zip(at(1024).settings({"betas": betas})["betas"], betas, strict=True):
            assert new <= own
        assert at(16).settings({"betas": betas})["betas"] == pytest.approx(betas)
    assert at(1024).settings({"betas": (0.3, 0.9)})["betas"] == (0.3, 0.9)
    assert at(4).settings({"betas": (0.3, 0.9)})["betas"] == pytest.approx((0.3**0.25, 0.9**0.25)), (
        "below the reference"
    )


@given(ratios, beta, beta, floor, floor, st.integers(0, 300))
def test_betas_stay_between_their_floor_and_one(
    ratio: float, beta1: float, beta2: float, floor1: float, floor2: float, steps: int
) -> None:
    followers = Followers(("betas",), beta1_floor=floor1, beta2_floor=floor2)
    scaling = at(16 * ratio, follow=followers, progress=Progress(steps=steps))
    settings = {"betas": (beta1, beta2)}
    new = scaling.settings(settings)["betas"]
    for value, own, low in zip(new, (beta1, beta2), (floor1, floor2), strict=True):
        assert min(low, own) * (1 - 1e-9) <= value <= 1
        assert value <= own * (1 + 1e-9) if ratio >= 1 else value >= own * (1 - 1e-9)
    first, second = scaling.exponents((beta1, beta2))
    assert scaling.averaged(settings) == second
    assert new == pytest.approx((beta1**first, beta2**second), rel=1e-12)
    if first != second:  # one count corrects both, and what is left of the first's beginning does not matter
        assert beta1**steps <= FORGOTTEN * (1 + 1e-9)
        assert (beta1**first) ** (steps / second) <= FORGOTTEN * (1 + 1e-9)


@given(st.lists(ratios, min_size=2, max_size=2).map(sorted), beta, beta)
def test_a_larger_batch_never_remembers_more_steps(two: list[float], beta1: float, beta2: float) -> None:
    small, large = (at(16 * ratio).settings({"betas": (beta1, beta2)})["betas"] for ratio in two)
    assert all(b <= a * (1 + 1e-9) for a, b in zip(small, large, strict=True))


def test_one_beta_may_follow_alone() -> None:
    alone = at(64, follow=Followers(("betas",), beta2_floor=1))
    assert alone.settings(BETAS)["betas"] == pytest.approx((0.9**4, 0.999), rel=1e-12)
    assert alone.averaged(BETAS) == 1.0
    assert at(64, follow=Followers(("betas",), beta1_floor=1)).settings(BETAS)["betas"][0] == 0.9


def test_the_betas_part_when_the_correction_of_the_first_no_longer_matters() -> None:
    first, second = math.log(0.5) / math.log(0.9), math.log(0.95) / math.log(0.999)
    steps = math.ceil(math.log(FORGOTTEN) / math.log(0.9) * second / first)
    together, apart = (at(1024, progress=Progress(steps=k)).exponents((0.9, 0.999)) for k in (steps - 1, steps))
    assert together == pytest.approx((first, first))
    assert apart == pytest.approx((first, second))
    assert steps == 511


def test_optimizers_with_one_beta_or_three() -> None:
    assert at(1024).settings({"betas": (0.9,)})["betas"] == pytest.approx((0.5,))
    assert at(1024).settings({"betas": (0.9, 0.999, 0.9999)})["betas"] == pytest.approx((0.5, 0.95, 0.9999**64))


@pytest.mark.parametrize("rule", ["none", "linear", "sqrt", "gain", "sqrt_gain"])
def test_the_factor_is_that_of_the_rule_times_the_decay_of_the_criterion(rule: Any) -> None:
    known = {"noise": 640.0, "signal": 2.0}
    rules = UpdateRules(rule, Followers(("weight_decay",)), lambda progress: 0.5 if progress.examples >= 100 else 1.0)
    plain = lr_factor(rule, 64, reference=16, **known)
    for count, decay in ((0, 1.0), (100, 0.5)):
        scaling = rules.at(64, Progress(examples=count), reference=16, **known)
        assert scaling.rule_factor == plain
        assert scaling.factor == (1.0 if rule == "none" else plain * decay)
        assert scaling.gain == gain(4, 16, **known)
        assert scaling.settings({"weight_decay": 0.1}) == {"weight_decay": pytest.approx(0.1 * 4 / plain)}
        assert scaling.averaged({"weight_decay": 0.1}) == 1.0


def test_nothing_follows_unless_asked() -> None:
    assert at(64, follow=()).settings(BETAS) == {}
    assert at(64, follow=()).averaged(BETAS) == 1.0
    assert at(64, follow=()).binding_floors([BETAS]) == {}


def test_what_is_refused() -> None:
    for name in ("beta1_floor", "beta2_floor"):
        for wrong in (-0.1, 1.1, math.nan):
            with pytest.raises(ValueError, match=rf"{name} must lie in \[0, 1\], where 0 sets no floor, got {wrong}"):
                Followers(("betas",), **{name: wrong})
    with pytest.raises(ValueError, match="follow takes betas, eps, weight_decay, got 'lr'"):
        Followers(("lr",))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="follow takes a collection"):
        Followers.of("betas")
    with pytest.raises(ValueError, match="lr_rule must be one of"):
        UpdateRules("square root")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch sizes must be positive"):
        at(0)
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"lr_decay\(progress\) must be finite and not negative"):
            UpdateRules("sqrt", Followers(), lambda progress, value=wrong: value).at(16, LATE, reference=16)


def test_followers_are_the_same_in_any_order() -> None:
    assert repr(Followers(("eps", "betas"))) == repr(Followers(["betas", "eps", "betas"]))
