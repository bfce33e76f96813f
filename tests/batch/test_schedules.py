"""Batch sizes that read only progress."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adabatch.batch.criteria import Criterion, Observation
from adabatch.batch.plan import Duration, Progress, examples, steps, tokens
from adabatch.batch.schedules import Constant, LinearRamp, Schedule, Seesaw, Stage, Stages
from adabatch.lr.shapes import cosine, linear, piecewise, polynomial

SCHEDULES: dict[str, Schedule] = {
    "Constant": Constant(64),
    "Stages": Stages(64, [Stage(examples(1000), 128), Stage(examples(5000), 512)]),
    "LinearRamp": LinearRamp(64, 512, examples(5000)),
    "Seesaw": Seesaw(64, cosine(floor=0.1), examples(5000)),
}

counts = st.integers(0, 10**7)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@given(counts)
def test_a_schedule_is_a_criterion_that_needs_nothing(schedule: Schedule, consumed: int) -> None:
    assert isinstance(schedule, Criterion)
    assert not schedule.needs
    progress = Progress(examples=consumed)
    assert schedule.wanted(Observation(None, progress)) == schedule.size(progress)
    assert 64 <= schedule.size(progress) <= 640
    assert all(size >= 1 for size in schedule.fixed_sizes)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@given(counts, counts)
def test_these_never_fall(schedule: Schedule, one: int, other: int) -> None:
    earlier, later = Progress(examples=min(one, other)), Progress(examples=max(one, other))
    assert schedule.size(earlier) <= schedule.size(later)


def test_fixed_sizes_are_those_that_must_be_run_exactly() -> None:
    assert SCHEDULES["Constant"].fixed_sizes == (64,)
    assert SCHEDULES["Stages"].fixed_sizes == (64, 128, 512)
    assert SCHEDULES["LinearRamp"].fixed_sizes == ()


# --- stages ---------------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 4096),
    st.dictionaries(st.integers(0, 10**6), st.integers(1, 4096), max_size=6),
    counts,
    st.sampled_from(["examples", "steps", "tokens"]),
)
def test_stages_are_a_table(first: int, table: dict[int, int], consumed: int, unit: str) -> None:
    schedule = Stages(first, [Stage(Duration(at, unit), table[at]) for at in sorted(table)])  # type: ignore[arg-type]
    passed = [at for at in table if consumed >= at]
    expected = table[max(passed)] if passed else first
    assert schedule.size(Progress(examples=consumed, steps=consumed, tokens=consumed)) == expected


def test_a_large_batch_jumps_over_several_milestones() -> None:
    schedule = Stages(8, [Stage(examples(100), 16), Stage(examples(200), 32), Stage(examples(300), 64)])
    before = Progress(examples=99)
    assert schedule.size(before) == 8
    assert schedule.size(before.after(1)) == 16
    assert schedule.size(before.after(250)) == 64


def test_bad_stages_are_named() -> None:
    with pytest.raises(ValueError, match=r"first must be .* got 0"):
        Stages(0, [])
    with pytest.raises(ValueError, match="got -8"):
        Stages(8, [Stage(examples(10), -8)])
    with pytest.raises(ValueError, match="share one unit, got 10 examples, 20 steps"):
        Stages(8, [Stage(examples(10), 16), Stage(steps(20), 32)])
    with pytest.raises(ValueError, match="ascend, got 20 examples, 10 examples"):
        Stages(8, [Stage(examples(20), 16), Stage(examples(10), 32)])
    with pytest.raises(ValueError, match="ascend, got 10 examples, 10 examples"):
        Stages(8, [Stage(examples(10), 16), Stage(examples(10), 32)])
    with pytest.raises(ValueError, match="tokens_per_example="):
        Stages(8, [Stage(tokens(10), 16)]).size(Progress(examples=5))


# --- the ramp -------------------------------------------------------------------------------------------------------


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 10**9), st.integers(0, 10**9))
def test_the_ramp_is_a_line_with_exact_ends(first: int, last: int, over: int, beyond: int) -> None:
    ramp = LinearRamp(first, last, examples(over))
    assert ramp.size(Progress()) == first
    assert ramp.size(Progress(examples=over)) == last
    assert ramp.size(Progress(examples=over + beyond)) == last
    inside = beyond % over
    expected = first + (last - first) * inside / over
    assert ramp.size(Progress(examples=inside)) == pytest.approx(expected, rel=1e-12)


def test_bad_ramps_are_named() -> None:
    for bad in (0, math.nan):
        with pytest.raises((TypeError, ValueError), match=f"first must be .* got {bad}"):
            LinearRamp(bad, 8, examples(10))  # type: ignore[arg-type]
        with pytest.raises((TypeError, ValueError), match=f"last must be .* got {bad}"):
            LinearRamp(8, bad, examples(10))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="over=0"):
        LinearRamp(8, 16, examples(0))


def test_bad_constants_are_named() -> None:
    for bad in (0, -1, math.nan, math.inf):
        with pytest.raises((TypeError, ValueError), match=f"global_batch_size must be .* got {bad}"):
            Constant(bad)  # type: ignore[arg-type]


# --- seesaw ---------------------------------------------------------------------------------------------------------


def test_seesaw_on_a_halving_schedule() -> None:
    """A schedule that halves four times; expected values by hand: batch 2^k, rate 2^(-k/2), and Adam's invariant."""
    halvings = piecewise(milestones=(0.2, 0.4, 0.6, 0.8), factors=(0.5,) * 4)
    schedule = Seesaw(32, halvings, steps(1000))
    expected = [  # cuts, plain decay, seesaw's rate, its batch
        (0, 1.0, 1.0, 1),
        (1, 0.5, 0.7071067811865476, 2),
        (2, 0.25, 0.5, 4),
        (3, 0.125, 0.3535533905932738, 8),
        (4, 0.0625, 0.25, 16),
    ]
    for consumed in range(1000):
        cuts, plain, rate, batch = expected[consumed // 200]
        progress = Progress(steps=consumed)
        assert schedule.cuts(progress) == cuts
        assert schedule.size(progress) == 32 * batch
        assert schedule.lr_factor(progress) == pytest.approx(rate, rel=1e-15)
        invariant = schedule.lr_factor(progress) / math.sqrt(schedule.size(progress) / 32)
        assert invariant == pytest.approx(plain, rel=1e-15)


@pytest.mark.parametrize("alpha", [1.25, 1.5, 3.0, 5.0, 10.0])
def test_an_exact_cut_is_on_its_own_side_of_the_rounding(alpha: float) -> None:
    """Quotients of logarithms of exact powers come out just below a whole number as often as on it."""
    falls = piecewise(milestones=tuple(k / 10 for k in range(1, 9)), factors=(1 / alpha,) * 8)
    schedule = Seesaw(32, falls, steps(1000), alpha=alpha)
    assert [schedule.cuts(Progress(steps=100 * k + 50)) for k in range(9)] == list(range(9))


@given(st.sampled_from([linear(), cosine(), polynomial(power=3.0)]), st.floats(1.01, 10), counts)
def test_seesaw_stays_within_one_cut_of_the_schedule(shape: object, alpha: float, consumed: int) -> None:
    """Rate over the root of the batch is the schedule's own, rounded up to the last cut."""
    total = 10**7 + 1
    schedule = Seesaw(8, shape, examples(total), alpha=alpha)  # type: ignore[arg-type]
    progress = Progress(examples=consumed)
    invariant = schedule.lr_factor(progress) / math.sqrt(schedule.size(progress) / 8)
    plain = shape(consumed / total)  # type: ignore[operator]
    assert plain * (1 - 1e-6) <= invariant <= plain * alpha * (1 + 1e-6)


def test_seesaw_saves_the_steps_it_claims() -> None:
    """With small cuts on a quarter cosine, 1 - 2 / pi of the steps (arXiv 2510.14717)."""
    total = 10**6
    schedule = Seesaw(64, lambda p: math.cos(math.pi / 2 * p), examples(total), alpha=1.001)
    progress = Progress()
    while progress.examples < total:
        progress = progress.after(round(schedule.size(progress)))
    # rounding of sizes, half a cut, and the last step, which may be as large as the rest
    assert 1 - progress.steps * 64 / total == pytest.approx(1 - 2 / math.pi, abs=2e-3)


def test_seesaw_at_the_end_of_a_decay_to_zero() -> None:
    schedule = Seesaw(64, linear(), examples(1000))
    for consumed in (1000, 1001, 10**9):
        progress = Progress(examples=consumed)
        assert schedule.cuts(progress) == math.inf
        assert schedule.size(progress) == math.inf
        assert schedule.lr_factor(progress) == 0


@pytest.mark.parametrize("factor", [5e-324, 1e-310, 1e-300])
def test_seesaw_on_a_factor_near_nothing(factor: float) -> None:
    schedule = Seesaw(64, lambda _: factor, examples(1000))
    assert schedule.size(Progress()) > 1e290
    assert 0 <= schedule.lr_factor(Progress()) < 1e-140


def test_bad_seesaws_are_named() -> None:
    with pytest.raises(ValueError, match=r"first must be .* got 0"):
        Seesaw(0, linear(), examples(10))
    for bad in (1.0, 0.5, -2.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"alpha must be .* got {bad}"):
            Seesaw(8, linear(), examples(10), alpha=bad)
    with pytest.raises(ValueError, match="got 0"):
        Seesaw(8, linear(), examples(0))
