"""The gain clock: examples where noise dominates, steps where signal does, and never back."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adabatch import lr
from adabatch.batch.plan import Duration, Progress, examples, gain_steps, steps
from adabatch.lr.clock import Anchor, Clock
from adabatch.lr.refine import refine
from adabatch.lr.rules import gain

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "lr_cases.json").read_text())["cases"]
REFERENCE = 16

sizes = st.lists(st.integers(1, 200), min_size=1, max_size=40)
noises = st.floats(0.01, 1e5)


def walk(sizes: list[int], *, noise: float, signal: float = 1.0) -> Iterator[tuple[Progress, Progress]]:
    """Progress before and after each step."""
    progress = Progress(gain_steps=0.0)
    for size in sizes:
        worth = gain(size / REFERENCE, REFERENCE, noise=noise, signal=signal)
        after = progress.after(size, gain=worth)
        yield progress, after
        progress = after


def read(clock: Clock, sizes: list[int], **moments: float) -> list[float]:
    """What the gain clock shows before each step, as a run reads it."""
    shown: list[float] = []
    anchor: Anchor | None = None
    passed = 0.0
    unit = clock.total.unit
    for before, after in walk(sizes, **moments):
        if clock.warming_up(before):
            continue
        worth = (after.count("gain_steps") - before.count("gain_steps")) / (after.count(unit) - before.count(unit))
        anchor = clock.anchor(before, worth) if anchor is None else anchor
        passed = clock.gain_fraction(before, worth, anchor, passed)
        shown.append(passed)
    return shown


@given(sizes, st.integers(1, 4000), st.none() | st.integers(0, 300))
def test_where_noise_dominates_it_is_the_clock_of_examples(sizes: list[int], total: int, warmup: int | None) -> None:
    """However the batch moves, and also behind a warm-up that the last batch overshot."""
    if warmup is not None and warmup >= total:
        total += warmup
    clock = Clock(examples(total), None if warmup is None else examples(warmup))
    shown = read(clock, sizes, noise=1.0, signal=0.0)
    starts = [before for before, _ in walk(sizes, noise=1.0, signal=0.0) if not clock.warming_up(before)]
    anchor = clock.anchor(starts[0]) if starts else None
    for before, fraction in zip(starts, shown, strict=True):
        assert anchor is not None
        assert fraction == pytest.approx(clock.fraction(before, anchor), rel=1e-9, abs=1e-9)


@given(sizes, st.integers(1, 60))
def test_where_signal_dominates_it_is_the_clock_of_steps(sizes: list[int], total: int) -> None:
    clock = Clock(steps(total))
    shown = read(clock, sizes, noise=0.0)
    for (before, _), fraction in zip(walk(sizes, noise=0.0), shown, strict=True):
        assert fraction == pytest.approx(clock.fraction(before), rel=1e-12, abs=1e-12)


@given(st.integers(1, 200), st.integers(1, 4000), noises)
def test_at_a_constant_batch_all_clocks_agree(size: int, total: int, noise: float) -> None:
    """Whatever the noise is: what differs between them is what a change of the batch does."""
    clock = Clock(examples(total))
    sizes = [size] * min(40, total // size + 2)
    shown = read(clock, sizes, noise=noise)
    for (before, _), fraction in zip(walk(sizes, noise=noise), shown, strict=True):
        assert fraction == pytest.approx(clock.fraction(before), rel=1e-9, abs=1e-9)


@given(sizes, st.integers(1, 4000), noises, st.sampled_from(["examples", "steps", "gain_steps"]))
def test_it_never_steps_back_and_ends_with_the_total(sizes: list[int], total: int, noise: float, unit: Any) -> None:
    clock = Clock(Duration(total, unit))
    shown = read(clock, sizes, noise=noise)
    assert shown[0] == 0
    assert shown == sorted(shown)
    for (before, _), fraction in zip(walk(sizes, noise=noise), shown, strict=True):
        assert (fraction == 1) == before.reached(clock.total), "the last batch, which may overshoot, still moves"


@given(sizes, st.integers(1, 4000), noises)
def test_it_lies_between_the_clocks_that_it_joins(sizes: list[int], total: int, noise: float) -> None:
    """For a batch that only grows: behind what is left in examples, ahead of what is left in steps of the last size."""
    growing = sorted(sizes)
    clock = Clock(examples(total))
    shown = read(clock, growing, noise=noise)
    as_steps = read(clock, growing, noise=0.0)
    for (before, _), fraction, by_steps in zip(walk(growing, noise=noise), shown, as_steps, strict=True):
        by_examples = clock.fraction(before)
        assert by_examples - 1e-9 <= fraction <= by_steps + 1e-9


def test_a_growth_of_the_batch_would_turn_it_back_where_the_batch_had_shrunk() -> None:
    """The formula alone falls when a step becomes worth more of an example again; the reading stands instead."""
    batches = [64] * 8 + [16] * 8 + [256] * 4
    clock, noise = Clock(examples(3000)), 40.0
    raw, passed = [], []
    for before, after in walk(batches, noise=noise):
        worth = (after.count("gain_steps") - before.count("gain_steps")) / (after.examples - before.examples)
        raw.append(clock.gain_fraction(before, worth, Anchor(0, 0.0), 0.0))
    passed = read(clock, batches, noise=noise)
    assert any(later < earlier for earlier, later in itertools.pairwise(raw))
    assert passed == [max(raw[: index + 1]) for index in range(len(raw))]


def test_gain_steps_of_a_published_run() -> None:
    """B01: the clock of gain-steps times the gain is what refinement finds for SGD, the growth of the batch in it."""
    case = GOLDEN["B01"]
    run, expected = case["inputs"], case["expected"]
    progress, worths, shown = Progress(gain_steps=0.0), [], []
    total = expected["cumulative_gain"][-1]
    for size in run["batch_sizes"]:
        worths.append(gain(size / run["B0"], run["B0"], noise=run["per_sample_variance"], signal=run["true_grad_sq"]))
        progress = progress.after(size, gain=worths[-1])
        # Read at the right end here, as the theory counts the step itself as done.
        shown.append(progress.count("gain_steps") / total)
    assert worths == pytest.approx(expected["gain"], rel=1e-14)
    assert progress.gain_steps == pytest.approx(total, rel=1e-14)
    weighed = np.array([worth * lr.linear()(p) for worth, p in zip(worths, shown, strict=True)])
    assert weighed / weighed.max() == pytest.approx(np.array(expected["refined_normalised"]), abs=1e-12)

    sq = run["true_grad_sq"] + run["per_sample_variance"] / np.array(run["batch_sizes"])
    refined = refine(np.sqrt(sq), "sgd", smoothing=0.0)
    assert refined.settings["values"] == pytest.approx(expected["refined_normalised"], abs=1e-12)


def test_a_run_by_hand() -> None:
    """Noise 32 over signal 1, reference 16: gains 1, 1.5, 2 at 16, 32, 64. Of 160 examples the batches take 16, 16, 32,
    32, 64 (the last overshoots nothing): done / (done + left * gain / size) at each."""
    shown = read(Clock(examples(160)), [16, 16, 32, 32, 64], noise=32.0)
    assert shown == pytest.approx(
        [
            0,
            1 / (1 + 144 / 16),
            2 / (2 + 128 * 1.5 / 32),
            3.5 / (3.5 + 96 * 1.5 / 32),
            5 / (5 + 64 * 2 / 64),
        ],
        rel=1e-15,
    )


def test_the_anchor_of_a_warmup_in_the_totals_unit_lies_where_the_warmup_ended() -> None:
    """Two batches of 30 overshoot a warm-up of 50 by 10 examples, worth 10 / 30 of the next step's gain."""
    clock = Clock(examples(100), examples(50))
    progress = Progress(examples=60, steps=2, gain_steps=3.0)
    assert clock.anchor(progress, 1.5 / 30) == Anchor(50, 0.0, 2.5)
    assert clock.gain_fraction(progress, 1.5 / 30, Anchor(50, 0.0, 2.5), 0.0) == pytest.approx(0.2)
    assert Clock(gain_steps(9), gain_steps(2)).anchor(progress, 1.0) == Anchor(2, 0.0, 2.0)
    assert Clock(examples(100), steps(2)).anchor(progress, 1.5 / 30) == Anchor(60, 0.0, 3.0)
