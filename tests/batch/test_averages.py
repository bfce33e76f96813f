"""Averages of probes: right on clean data whatever its tails, and hardly moved by a probe that is wrong.

Probes are drawn as they are in training: normal gradients of ``d`` equally noisy directions, in parts, so that noise is
chi-square with ``(num_parts - 1) d`` degrees of freedom and skewed where those are few.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.properties import with_examples
from support.simulated import GRID, LIMITS, RIGHT, TWO_PARTS, Level, constantly, drawn, sizes

from adabatch.batch.averages import RECENT, Averages, ProbeWindow
from adabatch.batch.control import Control, ControlState, Limits, Reason, decide
from adabatch.batch.criteria import NoiseScale, NormTest, Observation
from adabatch.batch.estimates import estimate
from adabatch.batch.moments import GradientMoments
from adabatch.batch.plan import BatchPlan, PlanGrid, Progress, micro_batch_sizes

PLAN = BatchPlan(micro_batch_size=8, accumulation_steps=8, dp_size=1)


def window_of(measurements: list[GradientMoments], control: Control | None = None) -> ProbeWindow:
    window, control = ProbeWindow(), control or Control()
    for moments in measurements:
        window = window.after(moments, decay=control.decay_after(window.num_probes + 1))
    return window


# --- on clean data ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_parts", "d"), [(2, 3), (2, 10), (2, 1000), (8, 2), (8, 30)])
def test_averages_are_unbiased_within_two_percent(num_parts: int, d: int) -> None:
    """Two parts with three directions have three degrees of freedom: a skewness of 1.6.

    What is left out, next to the plain mean of the same probes: the error of that mean itself cancels.
    """
    rng = np.random.default_rng(1)
    plan = BatchPlan(micro_batch_size=8, accumulation_steps=num_parts, dp_size=1)
    noise = 1.0 * plan.global_batch_size
    found, plain = np.zeros(2), np.zeros(2)
    for _ in range(40):
        probes = [drawn(rng, plan, noise=noise, d=d) for _ in range(60)]
        window, averages = ProbeWindow(), Averages()
        for count, moments in enumerate(probes):
            decay = Control().decay_after(count + 1)
            window, averages = window.after(moments, decay=decay), averages.after(moments, decay)
            if count >= 20:
                found += window.averages.noise, window.averages.signal
                plain += averages.noise, averages.signal
    assert found / plain == pytest.approx([1, 1], abs=0.02)
    assert plain / (40 * 40) == pytest.approx([noise, 1], rel=0.2), "and the plain mean is the right one"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("d", "num_parts", "ratio", "probes"), [(10, 8, 1.0, 20), (10, 2, 1.0, 40), (100, 4, 0.25, 20), (30, 8, 4.0, 100)]
)
def test_the_bar_is_honest_on_either_side(d: int, num_parts: int, ratio: float, probes: int) -> None:
    """Each side holds the truth in 0.87 to 0.94 of runs at 0.9, and two binomial errors of 300 runs (0.034) beyond."""
    plan = BatchPlan(micro_batch_size=8, accumulation_steps=num_parts, dp_size=1)
    noise = plan.global_batch_size / ratio
    rng = np.random.default_rng(2)
    held = np.zeros((2, 2))
    for _ in range(300):
        window = window_of([drawn(rng, plan, noise=noise, d=d) for _ in range(probes)])
        for row, (criterion, truth) in enumerate(((NormTest(0.5), 3 * noise), (NoiseScale(), noise))):
            bar = estimate(criterion, window.averages, plan, seen=Observation(None, Progress()), confidence=0.9)
            held[row] += bar.low <= truth, truth <= bar.high
    assert np.all(np.abs(held / 300 - 0.905) <= 0.035 + 0.034)


# --- one probe that is wrong ------------------------------------------------------------------------------------------


@with_examples(25)
@given(st.integers(0, 2**32 - 1), st.floats(3, 1e6), st.integers(0, 40), st.sampled_from(["part", "shared"]))
def test_one_probe_has_bounded_influence_whatever_its_size_and_place(
    seed: int, times: float, where: int, which: str
) -> None:
    """The first probe among them: it is judged by its successors."""
    rng = np.random.default_rng(seed)
    clean = [drawn(rng, PLAN, noise=64.0, d=100) for _ in range(45)]
    spiked = list(clean)
    if which == "part":
        spiked[where] = drawn(rng, PLAN, noise=64.0, d=100, part=times)
    else:
        spiked[where] = clean[where].scaled(times)
    once, again = window_of(clean).averages, window_of(spiked).averages
    assert again.noise == pytest.approx(once.noise, rel=0.3)
    assert again.noise_scale == pytest.approx(once.noise_scale, rel=0.5)


def test_a_spike_of_any_size_counts_less_than_a_small_one() -> None:
    rng = np.random.default_rng(3)
    before = [drawn(rng, PLAN, noise=64.0, d=100) for _ in range(30)]
    plain = window_of(before).averages.noise
    for times in (1e2, 1e8, 1e30):
        window = window_of([*before, before[-1].scaled(times)])
        assert window.weights[-1] == 0
        assert window.averages.noise == pytest.approx(plain, rel=0.05)


def test_probes_in_a_row_are_no_outliers() -> None:
    """Four make the majority of seven: the old ones are left out, and the window before them is dropped."""
    rng = np.random.default_rng(4)
    window = window_of([drawn(rng, PLAN, noise=64.0, d=100) for _ in range(60)])
    assert window.num_probes == 60
    levels = []
    for _ in range(5):
        moments = drawn(rng, PLAN, noise=6400.0, d=100)
        window = window.after(moments, decay=Control().decay_after(window.num_probes + 1))
        levels.append(window.averages.noise)
    assert max(levels[:3]) < 100
    assert 5000 < levels[3] < 8000
    assert window.past.weight == 0
    assert window.num_probes <= 7


def test_too_few_to_tell_are_all_believed() -> None:
    one, other = (drawn(np.random.default_rng(5), PLAN, noise=64.0, d=100).scaled(times) for times in (1.0, 3.0))
    assert window_of([one]).weights == (1.0,)
    assert window_of([one, other]).weights == (1.0, 1.0)


def test_a_memory_of_one_judges_nothing() -> None:
    rng = np.random.default_rng(6)
    probes = [drawn(rng, PLAN, noise=64.0, d=100) for _ in range(20)]
    window = window_of([*probes, probes[0].scaled(1e3)], Control.direct())
    assert window.averages.noise == pytest.approx(probes[0].noise * 1e6)


def test_noise_or_gradients_of_zero_judge_nothing() -> None:
    nothing = GradientMoments(0.0, 8, 0.0, 64, 8)
    window = window_of([nothing] * 10)
    assert window.weights == (1.0,) * RECENT
    assert window.averages.noise == 0
    same = GradientMoments(2.0, 8, 2.0, 64, 8)
    assert window_of([same] * 10).averages.signal == 2


def test_the_freedom_counts_the_parts_compared() -> None:
    rng = np.random.default_rng(7)
    probes = [drawn(rng, PLAN, noise=64.0, d=1000) for _ in range(5)]
    averages = window_of(probes, Control(memory=math.inf)).averages
    assert averages.freedom == pytest.approx(5 * 7)
    two = BatchPlan(micro_batch_size=8, accumulation_steps=2, dp_size=1)
    more = window_of([*probes, *(drawn(rng, two, noise=64.0, d=1000) for _ in range(5))], Control(memory=math.inf))
    assert more.averages.freedom == pytest.approx(10 * 4)


def test_the_window_grows_with_the_run_up_to_an_end() -> None:
    rng = np.random.default_rng(8)
    effective = []
    window, control = ProbeWindow(), Control(memory_share=0.2)
    for _ in range(400):
        moments = drawn(rng, PLAN, noise=64.0, d=1000)
        window = window.after(moments, decay=control.decay_after(window.num_probes + 1))
        effective.append(window.averages.num_effective)
    assert effective[40] == pytest.approx(10, rel=0.05)
    assert 15 < effective[100] < 25
    assert effective[399] == pytest.approx(50, rel=0.05)
    fixed = window_of([drawn(rng, PLAN, noise=64.0, d=1000) for _ in range(200)], Control(memory_share=0))
    assert fixed.averages.num_effective == pytest.approx(10, rel=0.05)


def test_another_norm_begins_a_new_window() -> None:
    rng = np.random.default_rng(9)
    probes = [drawn(rng, PLAN, noise=64.0, d=100) for _ in range(20)]
    other = probes[0]._replace(norm="adam")
    window = window_of(probes).after(other, decay=0.9)
    assert window == ProbeWindow().after(other, decay=0.9)
    assert window.averages.norm == "adam"


@with_examples(30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60))
def test_a_saved_window_is_the_same(seed: int, length: int) -> None:
    rng = np.random.default_rng(seed)
    window = window_of([drawn(rng, PLAN, noise=64.0, d=3, part=rng.choice([1.0, 50.0])) for _ in range(length)])
    loaded = ProbeWindow.from_state_dict(json.loads(json.dumps(window.state_dict(), allow_nan=False)))
    assert loaded == window
    assert loaded.averages == window.averages


def test_states_of_averages_alone_are_read() -> None:
    """As they were saved before the last probes were kept."""
    averages = {
        "weight": 5.5,
        "weight_sq": 3.0,
        "noise": 300.0,
        "signal": 2.0,
        "noise_along": None,
        "noise_at_quantile": None,
        "norm": "euclidean",
        "spread_noise": 40.0,
        "spread_signal": 0.1,
        "spread_both": -0.5,
    }
    state = ControlState.from_state_dict({"averages": averages, "hold": 3, "until_probe": 1, "times": []})
    assert (state.averages.noise, state.averages.signal, state.hold, state.until_probe) == (300, 2, 3, 1)
    later = state.window.after(drawn(np.random.default_rng(0), PLAN, noise=300.0, d=100, signal=2.0), decay=0.8)
    assert later.averages.num_effective > 5
    assert later.num_probes == 11


# --- the control that follows them ------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [2, 4, 7, 10, 100, 10_000])
@pytest.mark.parametrize("d", [10, 50])
def test_one_spiked_micro_batch_of_twenty_leaves_the_batch(times: float, d: int) -> None:
    """Its gradient times so much: inputs of a linear regression times 100 are a gradient times 10,000."""
    for seed in range(2):
        found = sizes(141, seed=seed, d=d, part=lambda step: times if step == 80 else 1)
        assert found[79] / 1.5 <= found[140] <= 1.5 * found[79]
        assert max(found[80:]) <= 1.5 * found[79]


@pytest.mark.slow
@pytest.mark.parametrize("which", ["part", "shared"])
def test_spikes_at_the_rate_of_logs_leave_the_batch(which: str) -> None:
    """0.2 % of steps have three times their norm, 0.03 % five times; 6,000 steps, the batch read at any of them."""
    chance = np.random.default_rng(10).random(6000)
    times = np.where(chance < 0.0003, 5.0, np.where(chance < 0.0023, 3.0, 1.0))
    assert (times > 1).sum() > 8
    spikes: dict[str, Level] = {
        # one part of twenty must be larger by twenty times as much to lengthen the mean so far
        "part": lambda step: float(1 + 20 * (times[step] - 1)),
        "shared": lambda step: float(times[step]),
    }
    found = sizes(6000, seed=11, **{which: spikes[which]})  # type: ignore[arg-type]
    assert min(found[100:]) > RIGHT / 2
    assert max(found) < 2 * RIGHT


@pytest.mark.parametrize("at", [0, 60])
@pytest.mark.parametrize("d", [10, 1000])
def test_one_large_shared_gradient_delays_by_five_probes_at_most(at: int, d: int) -> None:
    """A run whose batch should grow from 160 to 2,000, at its first step and while the batch is on its way."""
    control = Control(pace=math.inf)

    def reached(shared: Level, seed: int) -> int:
        found = sizes(
            140, seed=seed, d=d, rest=lambda step: RIGHT if step < at else 2000, shared=shared, control=control
        )
        return next(step for step, size in enumerate(found) if size >= 1600)

    delays = [reached(lambda step: 100 if step == at else 1, seed) - reached(constantly(1), seed) for seed in range(6)]
    assert np.median(delays) <= 5
    assert max(delays) <= (5 if d == 1000 else 15)


@pytest.mark.parametrize("grid", [GRID, TWO_PARTS], ids=["many parts", "two parts"])
@pytest.mark.parametrize("d", [100, 1000])
def test_a_rise_by_four_is_followed_within_ten_probes_and_a_fall_within_twenty(grid: PlanGrid, d: int) -> None:
    """To 0.8 of the new batch, after 200 probes: the window is long by then."""
    up, down = [], []
    for seed in range(3):
        found = sizes(230, seed=seed, d=d, grid=grid, rest=lambda step: RIGHT if step < 200 else 4 * RIGHT)
        up.append(next(step - 199 for step in range(200, 230) if found[step] >= 0.8 * 4 * RIGHT))
        found = sizes(
            230, seed=seed, d=d, grid=grid, start=4 * RIGHT, rest=lambda step: 4 * RIGHT if step < 200 else RIGHT
        )
        down.append(next(step - 199 for step in range(200, 230) if found[step] <= RIGHT / 0.8))
    assert max(up) <= 10
    assert max(down) <= 20


@with_examples(12)
@given(st.floats(0.1, 0.95), st.floats(1000, 1e5))
def test_the_batch_comes_to_rest_where_the_documentation_says(eta: float, noise_scale: float) -> None:
    """For a micro-batch that grows and for one that does not, from far below and from far above."""
    rest = noise_scale * (1 - eta**2) / eta**2
    for grid in (PlanGrid(dp_size=8, micro_sizes=micro_batch_sizes(1, 2**20)), PlanGrid(dp_size=8, micro_sizes=(1,))):
        for start in (8, 2**24):
            found = sizes(
                50,
                seed=0,
                eta=eta,
                rest=constantly(rest),
                d=10**7,
                grid=grid,
                start=start,
                limits=Limits(8, 2**24),
                control=Control(pace=math.inf),
            )
            assert 0.85 <= found[-1] / rest <= 1.15


def test_no_signal_seen_is_no_reason_to_wait() -> None:
    """From 64 to 0.8 of a noise scale of 20,000 in few directions, where doubling at every step would take eight."""
    took = []
    for seed in range(5):
        found = sizes(
            200,
            seed=seed,
            criterion=NoiseScale(),
            rest=constantly(60_000),  # of the norm test, so of a noise scale of 20,000
            d=10,
            grid=TWO_PARTS,
            start=64,
            control=Control(pace=math.inf),
        )
        took.append(next(step for step, size in enumerate(found) if size >= 16_000))
    assert np.median(took) < 60


def test_pure_noise_grows_the_batch() -> None:
    """Without any signal the right batch is infinite, and a criterion that finds none grows it on the lower bound."""
    rng, state, progress, plan = np.random.default_rng(12), ControlState(), Progress(), TWO_PARTS.nearest(64)
    reasons = []
    for _ in range(60):
        progress = progress.after(plan.global_batch_size)
        decision = decide(
            NoiseScale(),
            drawn(rng, plan, noise=64.0, d=100, signal=0.0),
            control=Control(),
            limits=Limits(64, 2**16),
            grid=TWO_PARTS,
            plan=plan,
            progress=progress,
            state=state,
        )
        grew = decision.plan.global_batch_size > plan.global_batch_size
        reasons.append((math.isinf(decision.estimate.wanted) if decision.estimate else False, grew))
        plan, state = decision.plan, decision.state
    assert (True, True) in reasons, "growth without a signal"
    assert plan.global_batch_size > 1000


def test_a_batch_at_rest_does_not_hunt() -> None:
    """Around the right batch in a noise of few directions: few changes, none far, and on average the right batch."""
    changes = 0
    for seed in range(2):
        found = sizes(600, seed=seed, d=10)[100:]
        assert RIGHT / 1.3 < min(found) <= max(found) < 1.3 * RIGHT
        assert np.mean(found) == pytest.approx(RIGHT, rel=0.1)
        changes += np.count_nonzero(np.diff(found))
    assert changes < 0.05 * 2 * 500


def test_where_noise_wanders_the_batch_returns_and_a_ratchet_does_not() -> None:
    """The logarithm of the noise scale wanders by 0.3, with a time constant of 20 probes."""
    rng, wander = np.random.default_rng(13), [0.0]
    for _ in range(599):
        wander.append(wander[-1] * 0.95 + 0.3 * math.sqrt(1 - 0.95**2) * rng.standard_normal())
    rest: Level = lambda step: RIGHT * math.exp(wander[step])  # noqa: E731
    free = np.mean(sizes(600, seed=14, d=100, rest=rest)[100:])
    only_up = np.mean(sizes(600, seed=14, d=100, rest=rest, control=Control(monotone=True))[100:])
    assert 0.8 < free / RIGHT < 1.25
    assert only_up > 1.2 * free


@with_examples(10)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 0.9), st.floats(1.05, 3))
def test_a_smaller_eta_never_rests_at_a_smaller_batch(seed: int, eta: float, times: float) -> None:
    window = window_of([drawn(np.random.default_rng(seed), PLAN, noise=64.0, d=30) for _ in range(30)])
    observation = Observation(window.averages.moments(PLAN), Progress())
    assert NormTest(eta / times).rest(observation) >= NormTest(eta).rest(observation)


@with_examples(10)
@given(st.integers(0, 1000), st.integers(-30, 30))
def test_neither_spikes_nor_jumps_depend_on_the_scale_of_the_gradient(seed: int, exponent: int) -> None:
    """By a power of two, so that nothing is rounded: each batch is the same."""
    options = {"seed": seed, "rest": lambda step: RIGHT if step < 40 else 4 * RIGHT}
    once = sizes(60, shared=lambda step: 64.0 if step % 17 == 3 else 1.0, **options)  # type: ignore[arg-type]
    again = sizes(60, shared=lambda step: 2.0**exponent * (64.0 if step % 17 == 3 else 1.0), **options)  # type: ignore[arg-type]
    assert once == again


def test_reasons_without_a_bar() -> None:
    """One probe alone has no bound on the signal: the plan is held."""
    moments = GradientMoments(10.0, 8, 0.5, 64, 8)
    assert moments.signal < 0
    decision = decide(
        NoiseScale(),
        moments,
        control=Control(pace=math.inf),
        limits=LIMITS,
        grid=GRID,
        plan=PLAN,
        progress=Progress(examples=64, steps=1),
        state=ControlState(),
    )
    assert (decision.reason, decision.plan) == (Reason.NO_SIGNAL, PLAN)
