"""The clock's two conventions, simulated step by step, and where the shape starts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from adabatch.batch.plan import Duration, Progress, examples, steps, tokens
from adabatch.lr.clock import BEGINNING, Anchor, Clock

TOKENS_PER_EXAMPLE = 7

batch_sizes = st.lists(st.integers(1, 50), min_size=1, max_size=60)
units = st.sampled_from(["examples", "steps", "tokens"])


def walk(sizes: list[int]) -> Iterator[tuple[Progress, Progress]]:
    """Progress before and after each step of the sizes."""
    progress = Progress(tokens=0)
    for size in sizes:
        after = progress.after(size, TOKENS_PER_EXAMPLE * size)
        yield progress, after
        progress = after


@given(batch_sizes, units, st.integers(1, 2000))
def test_without_warmup_the_shape_is_read_at_the_left_end(sizes: list[int], unit: str, total: int) -> None:
    clock = Clock(Duration(total, unit))  # type: ignore[arg-type]
    fractions = []
    for before, _ in walk(sizes):
        assert not clock.warming_up(before)
        assert clock.anchor(before) == BEGINNING == Anchor(0, 0.0)
        fractions.append(clock.fraction(before, clock.anchor(before)))
        consumed = before.count(unit)  # type: ignore[arg-type]
        assert fractions[-1] == pytest.approx(min(1, consumed / total), rel=1e-12)
        if consumed < total:
            assert fractions[-1] < 1, "the last batch, which may overshoot, still moves"
    assert fractions[0] == 0
    assert fractions == sorted(fractions)


@given(batch_sizes, units, st.integers(1, 300))
def test_warmup_is_read_at_the_right_end(sizes: list[int], unit: str, length: int) -> None:
    warmup = Duration(length, unit)  # type: ignore[arg-type]
    clock = Clock(Duration(10**9, unit), warmup)  # type: ignore[arg-type]
    ramp = [
        (clock.warmup_fraction(after), after.reached(warmup))
        for before, after in walk(sizes)
        if clock.warming_up(before)
    ]
    assert all(fraction > 0 for fraction, _ in ramp), "the first step already moves"
    assert all((fraction == 1) == completes for fraction, completes in ramp)
    assert [completes for _, completes in ramp].count(True) <= 1, "only the step that completes the warm-up runs at 1"
    fractions = [fraction for fraction, _ in ramp]
    assert all(low < high for low, high in itertools.pairwise(fractions))


@given(batch_sizes, units, st.integers(1, 300), st.integers(1, 3000))
def test_the_shape_runs_over_what_the_warmup_left(sizes: list[int], unit: str, length: int, rest: int) -> None:
    clock = Clock(Duration(length + rest, unit), Duration(length, unit))  # type: ignore[arg-type]
    for before, _ in walk(sizes):
        if clock.warming_up(before):
            continue
        anchor = clock.anchor(before)
        assert anchor == Anchor(length, 0.0), "however far the last batch overshot"
        consumed = before.count(unit)  # type: ignore[arg-type]
        assert clock.fraction(before, anchor) == pytest.approx(min(1, (consumed - length) / rest), rel=1e-12)


@given(batch_sizes, st.permutations(["examples", "steps", "tokens"]), st.integers(1, 60), st.integers(1, 5000))
def test_the_anchor_of_another_unit_is_where_the_warmup_ended(
    sizes: list[int], order: list[str], length: int, total: int
) -> None:
    clock = Clock(Duration(total, order[0]), Duration(length, order[1]))  # type: ignore[arg-type]
    over = [before for before, _ in walk(sizes) if not clock.warming_up(before)]
    assume(over)
    anchor = clock.anchor(over[0])
    assert anchor == Anchor(over[0].count(order[0]), 0.0)  # type: ignore[arg-type]
    fractions = [clock.fraction(before, anchor) for before in over]
    assert fractions[0] == (0 if anchor.count < total else 1), (
        "the shape starts from its beginning, if anything is left"
    )
    assert fractions == sorted(fractions)
    assert all(0 <= fraction <= 1 for fraction in fractions)


def test_a_run_of_four_steps_by_hand() -> None:
    """Batches of 30 to a total of 100 with 50 of warm-up: factors 0.6, 1, then the shape at 10/50 and 40/50."""
    clock = Clock(examples(100), examples(50))
    read = [
        clock.warmup_fraction(after) if clock.warming_up(before) else clock.fraction(before, clock.anchor(before))
        for before, after in walk([30, 30, 30, 30])
    ]
    assert read == pytest.approx([0.6, 1.0, 0.2, 0.8], rel=1e-15)


def test_overshoot_is_clamped() -> None:
    clock = Clock(examples(100), steps(2))
    assert clock.fraction(Progress(examples=130, steps=5), Anchor(40, 0.0)) == 1
    assert clock.fraction(Progress(examples=30, steps=1), Anchor(40, 0.0)) == 0
    assert clock.fraction(Progress(examples=100, steps=2), Anchor(100, 0.0)) == 1
    assert clock.fraction(Progress(examples=200, steps=2), Anchor(150, 0.0)) == 1
    assert clock.warmup_fraction(Progress(examples=64, steps=9)) == 1


def test_a_warmup_of_nothing_is_none() -> None:
    for clock in (Clock(examples(100)), Clock(examples(100), steps(0)), Clock(examples(100), examples(0))):
        assert not clock.warming_up(Progress())
        assert clock.anchor(Progress()) == BEGINNING
        assert clock.warmup_fraction(Progress()) == 1


def test_bad_clocks_are_named() -> None:
    with pytest.raises(ValueError, match=r"total .* got 0"):
        Clock(examples(0))
    for length in (100, 101):
        with pytest.raises(ValueError, match=f"{length} examples must be shorter than the total of 100 examples"):
            Clock(examples(100), examples(length))
    Clock(examples(100), steps(100))  # of another unit, which is longer is not known
    with pytest.raises(ValueError, match="tokens_per_example="):
        Clock(tokens(100)).fraction(Progress(examples=5, steps=1))
