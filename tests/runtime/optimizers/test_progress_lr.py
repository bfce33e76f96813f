"""``ProgressLR`` over a whole run: its clocks, totals that change, large batches, copies, and what it refuses."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.loops import lines, loss_of, network, regression, train
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from adabatch import (
    AdaptiveBatch,
    Constant,
    GlobalOrder,
    Limits,
    NormTest,
    ProgressLR,
    Seesaw,
    Stage,
    Stages,
    examples,
    gain_steps,
    lr,
    steps,
)
from adabatch.adaptive.options import Measure
from adabatch.batch import Duration, Progress
from adabatch.lr.rules import gain

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "lr_cases.json").read_text())["cases"]
REFERENCE = 16


class Run:
    """A run whose batch moves as told, and which knows its noise: what ``ProgressLR`` reads of an ``AdaptiveBatch``."""

    lr_factor = 1.0

    def __init__(self, sizes: list[int], *, noise: float = 100.0, progress: Progress | None = None) -> None:
        self.sizes = sizes
        self.noise = noise
        self.progress = progress or Progress(gain_steps=0.0)

    @property
    def progress_after_next(self) -> Progress:
        size = self.sizes[min(self.progress.steps, len(self.sizes) - 1)]
        return self.progress.after(size, gain=gain(size / REFERENCE, REFERENCE, noise=self.noise, signal=1.0))


def sgd(rate: Any = 0.1) -> SGD:
    return SGD(network().parameters(), lr=rate)


def drive(optimizer: Optimizer, schedule: ProgressLR, run: Run, count: int = 10**6) -> list[float]:
    """Updates until the sizes of ``run`` are used up, or so many; the rate of each."""
    rates: list[float] = []
    while run.progress.steps < len(run.sizes) and len(rates) < count:
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        run.progress = run.progress_after_next
        schedule.step()
    return rates


def hooks_of(optimizer: Optimizer) -> int:
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


# --- the gain clock in a run ----------------------------------------------------------------------------------------


def test_the_rate_of_every_update_follows_from_the_journal(tmp_path: Path) -> None:
    """Gain clock and gain rule in a run that measures its noise, worked out anew from what it wrote down."""
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    total = 4000
    batches = AdaptiveBatch(
        model,
        optimizer,
        NormTest(eta=0.4),
        micro_batch_size=4,
        limits=Limits(min=8, max=128),
        lr_rule="gain",
        journal=tmp_path / "journal.jsonl",
    )
    schedule = ProgressLR(optimizer, lr.linear(), batches, total=examples(total), warmup=steps(5), clock="gain")
    order = GlobalOrder(regression(1000), seed=1)
    said: list[float] = []
    for step in batches.steps(order, until=examples(total)):
        for batch in step:
            step.backward(loss_of(model, batch))
        said.append(schedule.get_last_lr()[0])
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    written = lines(tmp_path / "journal.jsonl")
    sizes = [line["plan"]["global_batch_size"] for line in written]
    assert sizes[-1] > 4 * sizes[0], "the batch must have grown for this test to say anything"

    def worth(size: int, averages: Any) -> float:
        if averages is None:
            return 1.0
        return gain(size / 8, 8.0, noise=averages["noise"], signal=averages["signal"])

    tau, consumed, passed, start = 0.0, 0, 0.0, 0.0
    known = None
    for index, (line, size) in enumerate(zip(written, sizes, strict=True)):
        if index < 5:
            shape = (index + 1) / 5
            start = tau + worth(size, line["averages"])
        else:
            done, left = tau - start, (total - consumed) * worth(size, known) / size
            passed = max(passed, done / (done + left))
            shape = 1 - passed
        known = line["averages"]
        factor = worth(size, known)
        assert line["lr"]["factor"] == pytest.approx(factor, rel=1e-12)
        assert line["lr"]["shape"] == pytest.approx([shape], rel=1e-9)
        assert line["lr"]["applied"] == pytest.approx([0.1 * shape * factor], rel=1e-9)
        assert said[index] == line["lr"]["applied"][0], "get_last_lr is what is applied"
        tau, consumed = tau + factor, consumed + size
    assert batches.progress.gain_steps == pytest.approx(tau, rel=1e-12)
    assert schedule.factor() == 0


def test_a_gain_clock_resumes_in_mid_run(tmp_path: Path) -> None:
    """Among others the fraction passed, which no formula gives back."""
    sizes, options = [64] * 8 + [16] * 8 + [256] * 4, {"total": examples(2000), "clock": "gain"}
    whole, run = sgd(), Run(sizes, noise=40.0)
    expected = drive(whole, ProgressLR(whole, lr.linear(), run, **options), run)
    for at in (0, 5, 12, 16, 17, 19):
        first, run = sgd(), Run(sizes, noise=40.0)
        schedule = ProgressLR(first, lr.linear(), run, **options)
        rates = drive(first, schedule, run, at)
        state = json.loads(json.dumps(schedule.state_dict()))
        second, resumed = sgd(), Run(sizes, noise=40.0)
        schedule = ProgressLR(second, lr.linear(), resumed, **options)
        resumed.progress = run.progress
        schedule.load_state_dict(state)
        assert rates + drive(second, schedule, resumed) == expected


def test_no_number_of_steps_is_needed() -> None:
    """The same schedule, whatever the batch turns out to do: it starts at the beginning, ends with the examples."""
    for sizes in ([16] * 100, [16] * 20 + [64] * 20, [16, 32, 64, 128, 256, 512, 592]):
        assert sum(sizes) == 1600
        optimizer, run = sgd(), Run(sizes)
        schedule = ProgressLR(optimizer, lr.cosine(), run, total=examples(1600), clock="gain")
        rates = drive(optimizer, schedule, run)
        assert rates[0] == 0.1
        assert rates == sorted(rates, reverse=True)
        assert min(rates) > 0
        assert optimizer.param_groups[0]["lr"] == 0


# --- totals that change ---------------------------------------------------------------------------------------------

totals = st.integers(1, 4000)


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=30),
    more=st.lists(st.integers(1, 60), min_size=1, max_size=30),
    unit=st.sampled_from(["examples", "steps"]),
    clock=st.sampled_from(["total", "gain"]),
    shape=st.sampled_from([lr.linear(), lr.cosine(floor=0.1), lr.wsd(cooldown=0.5)]),
    warmup=st.none() | st.integers(0, 9).map(steps),
    left=st.integers(1, 2000),
)
def test_a_changed_total_moves_the_rate_of_no_update_but_those_to_come(
    sizes: list[int], more: list[int], unit: Any, clock: Any, shape: lr.Shape, warmup: Duration | None, left: int
) -> None:
    optimizer, run = sgd(), Run(sizes + more)
    schedule = ProgressLR(optimizer, shape, run, total=Duration(1000, unit), warmup=warmup, clock=clock)
    rates = drive(optimizer, schedule, run, len(sizes))
    before = optimizer.param_groups[0]["lr"]
    there = int(run.progress.count(unit))
    if warmup is not None and unit == "steps" and there + left <= warmup.count:
        with pytest.raises(ValueError, match="must be shorter than the total"):
            schedule.set_total(Duration(there + left, unit))
        return
    schedule.set_total(Duration(there + left, unit))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(before, rel=1e-12)
    assert schedule.get_last_lr() == [optimizer.param_groups[0]["lr"]]
    later = drive(optimizer, schedule, run)
    if warmup is None:
        assert rates + later == sorted(rates + later, reverse=True)
    if run.progress.reached(Duration(there + left, unit)) and (warmup is None or run.progress.reached(warmup)):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * shape(1.0), rel=1e-12, abs=1e-17)


@pytest.mark.parametrize("clock", ["total", "gain"])
def test_what_is_left_of_the_shape_takes_what_is_left_of_the_run(clock: Any) -> None:
    """At a constant batch both clocks are lines: 40 of 100 steps, then the 60 % that is left over 180 or 20 more."""
    for total, slope in ((220, 0.6 / 180), (60, 0.6 / 20)):
        optimizer, run = sgd(1.0), Run([16] * total)
        schedule = ProgressLR(optimizer, lr.linear(), run, total=steps(100), clock=clock)
        rates = drive(optimizer, schedule, run, 40)
        schedule.set_total(steps(total))
        rates += drive(optimizer, schedule, run)
        expected = [1 - t / 100 if t < 40 else 0.6 - slope * (t - 40) for t in range(total)]
        assert rates == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert optimizer.param_groups[0]["lr"] == 0


@pytest.mark.parametrize("clock", ["total", "gain"])
@pytest.mark.parametrize("changes", [{30: 2000}, {30: 500, 36: 1600}, {2: 800}])
def test_a_run_resumed_after_its_total_changed(clock: Any, changes: dict[int, int]) -> None:
    """It is built with the total that it has now."""
    sizes = [8] * 30 + [16] * 10 + [32] * 40
    options: dict[str, Any] = {"warmup": steps(5), "clock": clock}

    def go_on(optimizer: Optimizer, schedule: ProgressLR, run: Run) -> list[float]:
        rates: list[float] = []
        while run.progress.steps < len(sizes):
            if run.progress.steps in changes:
                schedule.set_total(examples(changes[run.progress.steps]))
            rates += drive(optimizer, schedule, run, 1)
        return rates

    whole, run = sgd(), Run(sizes)
    expected = go_on(whole, ProgressLR(whole, lr.cosine(), run, total=examples(1000), **options), run)

    first, run = sgd(), Run(sizes)
    schedule = ProgressLR(first, lr.cosine(), run, total=examples(1000), **options)
    for at in changes:
        drive(first, schedule, run, at - run.progress.steps)
        schedule.set_total(examples(changes[at]))
    drive(first, schedule, run, 1)
    there, state = run.progress.steps, json.loads(json.dumps(schedule.state_dict()))

    second, resumed = sgd(), Run(sizes, progress=run.progress)
    schedule = ProgressLR(second, lr.cosine(), resumed, total=examples(list(changes.values())[-1]), **options)
    schedule.load_state_dict(state)
    assert drive(second, schedule, resumed) == expected[there:]


def test_a_total_in_another_unit() -> None:
    optimizer, run = sgd(1.0), Run([10] * 20)
    schedule = ProgressLR(optimizer, lr.linear(), run, total=examples(100))
    drive(optimizer, schedule, run, 4)
    schedule.set_total(steps(16))
    rates = drive(optimizer, schedule, run, 13)
    assert rates == pytest.approx([0.6 * (1 - t / 12) for t in range(13)], abs=1e-15)


def test_a_run_whose_shape_is_over_stays_at_its_end() -> None:
    optimizer, run = sgd(1.0), Run([10] * 30)
    schedule = ProgressLR(optimizer, lr.cosine(floor=0.25), run, total=examples(100))
    drive(optimizer, schedule, run, 12)
    schedule.set_total(examples(200))
    assert drive(optimizer, schedule, run) == [0.25] * 18


@pytest.mark.parametrize(
    ("total", "error", "words"),
    [
        (300, TypeError, r"total must be a duration, such as adabatch.steps\(300\), got 300"),
        (examples(40), ValueError, "already past 40 examples: give a total that lies ahead"),
        (examples(0), ValueError, "already past 0 examples"),
        (Duration(10**6, "tokens"), ValueError, "does not count tokens"),
    ],
    ids=str,
)
def test_totals_that_cannot_be(total: Any, error: type[Exception], words: str) -> None:
    optimizer, run = sgd(), Run([10] * 20)
    schedule = ProgressLR(optimizer, lr.linear(), run, total=examples(100))
    drive(optimizer, schedule, run, 5)
    state, rate = schedule.state_dict(), optimizer.param_groups[0]["lr"]
    with pytest.raises(error, match=words):
        schedule.set_total(total)
    assert schedule.state_dict() == state
    assert optimizer.param_groups[0]["lr"] == rate


def test_counted_steps_cannot_take_a_total_in_examples() -> None:
    schedule = ProgressLR(sgd(), lr.linear(), total=steps(10))
    with pytest.raises(ValueError, match="20 examples cannot be counted without an AdaptiveBatch"):
        schedule.set_total(examples(20))


# --- large batches --------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 400), min_size=1, max_size=30), st.sampled_from(["total", "gain"]))
def test_the_last_batch_may_overshoot(sizes: list[int], clock: Any) -> None:
    """It still runs above the end of the shape, and everything after it at the end."""
    optimizer, run = sgd(1.0), Run(sizes)
    rates = drive(optimizer, ProgressLR(optimizer, lr.linear(), run, total=examples(1000), clock=clock), run)
    for index, rate in enumerate(rates):
        assert (rate > 0) == (sum(sizes[:index]) < 1000)


@pytest.mark.parametrize("clock", ["total", "gain"])
def test_milestones_that_a_large_batch_jumps_over(clock: Any) -> None:
    """From 10 % to 70 % in one step: the factors of 20 %, 40 % and 60 % all hold from the next update on."""
    shape = lr.piecewise(milestones=[0.08, 0.2, 0.4, 0.6, 0.88], factors=[0.5] * 5)
    optimizer, run = sgd(1.0), Run([50, 50, 600, 100, 100, 100], noise=1e9)
    rates = drive(optimizer, ProgressLR(optimizer, shape, run, total=examples(1000), clock=clock), run)
    assert rates == [1, 1, 1 / 2, 1 / 16, 1 / 16, 1 / 32]


def test_a_cooldown_in_which_the_batch_grows() -> None:
    """The cooldown is as long in examples as it was: no rate is skipped but those inside the larger batches, and the
    last batch runs at its own share of the cooldown."""
    sizes = [16] * 50 + [16] * 5 + [32] * 5 + [80] * 2
    total, begin = sum(sizes), 800
    cooldown = (total - begin) / total
    optimizer, run = sgd(1.0), Run(sizes)
    rates = drive(optimizer, ProgressLR(optimizer, lr.wsd(cooldown=cooldown), run, total=examples(total)), run)
    consumed = [sum(sizes[:index]) for index in range(len(sizes))]
    expected = [1.0 if n <= begin else (total - n) / (total - begin) for n in consumed]
    assert rates == pytest.approx(expected, rel=1e-9)
    assert rates[-1] == pytest.approx(80 / (total - begin))
    # Over examples it is the line that one would have drawn, too high by less than half of the largest batch's share.
    area = sum(rate * size for rate, size in zip(rates, sizes, strict=True))
    assert 0 < area - (begin + (total - begin) / 2) <= max(sizes) / 2


B03_SHAPES = {
    "linear": lr.linear(floor=0.01),
    "cosine": lr.cosine(floor=0.01),
    "WSD:linear": lr.wsd(cooldown=704 / 3264, floor=0.01),
    "WSD:minus_sqrt": lr.wsd(cooldown=704 / 3264, decay="1-sqrt", floor=0.01),
    "WSD:exponential": lr.wsd(cooldown=704 / 3264, decay="exponential", floor=0.01),
    "inverse-square-root": lr.inverse_sqrt(timescale=256 / 3264),
}


@pytest.mark.parametrize("name", B03_SHAPES)
def test_a_growing_batch_against_megatrons_formula(name: str) -> None:
    """B03. Warm-up is read one update later there (its first update has a rate of zero), all else is the same."""
    case = GOLDEN["B03"]
    sizes = [16] * 20 + [32] * 20 + [64] * 20 + [128] * 10 + [128]
    optimizer, run = sgd(1e-3), Run(sizes)
    schedule = ProgressLR(optimizer, B03_SHAPES[name], run, total=examples(3520), warmup=examples(256))
    rates = drive(optimizer, schedule, run)
    expected = {int(at): rate for at, rate in case["expected"]["lr"][name].items()}
    for at, rate in expected.items():
        if at < 16:
            assert rates[at] == pytest.approx(rate + 1e-3 * 16 / 256, rel=1e-12)
        elif not (name == "inverse-square-root" and at == 70):  # past the end, where ours stands still
            assert rates[at] == pytest.approx(rate, rel=1e-12)


def test_of_the_ways_to_count_a_decay_ours_is_the_left_end() -> None:
    """Of D updates number t (from 0) runs at (D - t) / D: as in transformers; torchtitan's never reaches the peak in
    its decay, the cooldown of Schaipp et al. begins one step earlier, that of Haegele et al. is the same as ours."""
    optimizer = sgd(1.0)
    schedule = ProgressLR(optimizer, lr.wsd(cooldown=0.2), total=steps(100))
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    left_end = [1.0] * 80 + [(20 - k) / 20 for k in range(20)]
    torchtitan = [1.0] * 80 + [(20 - k) / 21 for k in range(20)]
    assert rates == pytest.approx(left_end, rel=1e-12)
    assert rates[80:] == pytest.approx([(100 - i) / 20 for i in range(80, 100)], rel=1e-12)  # (T - i) / K, as logged
    assert all(ours > theirs for ours, theirs in zip(rates[80:], torchtitan[80:], strict=True))


# --- what is refused, and what is defined ---------------------------------------------------------------------------


@pytest.mark.parametrize("clock", ["total", "gain"])
def test_a_horizon_that_ends_inside_a_warmup_of_another_unit(clock: Any) -> None:
    """Nobody can know before: the warm-up goes on to its end, and finds the shape over."""
    optimizer, run = sgd(1.0), Run([50] * 9)
    schedule = ProgressLR(optimizer, lr.linear(), run, total=examples(100), warmup=steps(5), clock=clock)
    assert drive(optimizer, schedule, run) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 0, 0, 0, 0])


def test_a_horizon_that_is_not_longer_than_its_warmup() -> None:
    for unit in (steps, examples, gain_steps):
        with pytest.raises(ValueError, match="must be shorter than the total"):
            ProgressLR(sgd(), lr.linear(), Run([10]), total=unit(50), warmup=unit(50))
    optimizer, run = sgd(), Run([10] * 9)
    schedule = ProgressLR(optimizer, lr.linear(), run, total=steps(90), warmup=steps(6))
    drive(optimizer, schedule, run, 2)
    state = schedule.state_dict()
    with pytest.raises(ValueError, match="warm-up of 6 steps must be shorter than the total of 5 steps"):
        schedule.set_total(steps(5))
    assert schedule.state_dict() == state


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"total": examples(200)}, r"total=\[100, 'examples'\], this run has \[200, 'examples'\].*set_total"),
        ({"total": steps(100)}, r"total=\[100, 'examples'\], this run has \[100, 'steps'\]"),
        ({"warmup": steps(4)}, r"warmup=\[3, 'steps'\], this run has \[4, 'steps'\]"),
        ({"warmup": None}, r"warmup=\[3, 'steps'\], this run has None"),
        ({"warmup_start": 0.5}, r"warmup_start=0.1, this run has 0.5"),
        ({"clock": "gain"}, r"clock=total, this run has gain"),
        ({"shape": lr.linear(floor=0.1)}, r"shape linear\(\), this run has linear\(floor=0.1\)"),
    ],
    ids=str,
)
def test_a_resume_with_another_schedule_is_refused_and_changes_nothing(options: dict[str, Any], words: str) -> None:
    saved: dict[str, Any] = {"total": examples(100), "warmup": steps(3), "warmup_start": 0.1}
    optimizer, run = sgd(0.5), Run([10] * 20)
    schedule = ProgressLR(optimizer, lr.linear(), run, **saved)
    drive(optimizer, schedule, run, 6)
    state = schedule.state_dict()

    options = {**saved, **options}
    other = sgd(0.1)
    schedule = ProgressLR(other, options.pop("shape", lr.linear()), Run([10] * 20), **options)
    mine, rate = schedule.state_dict(), other.param_groups[0]["lr"]
    with pytest.raises(ValueError, match=words):
        schedule.load_state_dict(state)
    assert schedule.state_dict() == mine
    assert (other.param_groups[0]["lr"], other.param_groups[0]["initial_lr"]) == (rate, 0.1)
    assert schedule.get_lr() == [rate]


def test_a_schedule_stepped_without_an_update_stays_where_it_is() -> None:
    """Progress has not moved, so the rate has not; a gradient scaler may leave out the first update of a run."""
    optimizer = sgd()
    schedule = ProgressLR(optimizer, lr.linear(), total=steps(10))
    for _ in range(3):
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.1
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.09)


class Wrapper(Optimizer):
    """An optimizer by type, and not by its parts: Accelerate's is one."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    def step(self, closure: Any = None) -> None:
        self.optimizer.step(closure)


def test_a_wrapper_without_hooks_is_refused_at_once() -> None:
    optimizer = sgd(0.1)
    with pytest.raises(TypeError, match="Wrapper is not an optimizer with step hooks: give the optimizer inside it"):
        ProgressLR(Wrapper(optimizer), lr.linear(), total=steps(10), warmup=steps(5))
    assert optimizer.param_groups[0]["lr"] == 0.1
    model = network()
    inner = SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="Wrapper is not an optimizer with step hooks"):
        AdaptiveBatch(model, Wrapper(inner), NormTest(eta=0.5), micro_batch_size=4, limits=Limits(min=8, max=64))
    assert hooks_of(inner) == sum(len(p._backward_hooks or {}) for p in model.parameters()) == 0
    with pytest.raises(TypeError, match="or a list of several, got a list with int in it"):
        ProgressLR([1, 2], lr.linear(), total=steps(10))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clock": "gains"}, "clock must be one of total, gain, got 'gains'"),
        ({"clock": "gain"}, "clock='gain' cannot be read without an AdaptiveBatch"),
        ({"warmup": gain_steps(3)}, "3 gain_steps cannot be counted without an AdaptiveBatch"),
        ({"total": examples(5)}, "5 examples cannot be counted without an AdaptiveBatch"),
        ({"warmup_start": math.nan}, r"warmup_start must be in \[0, 1\], got nan"),
        ({"warmup": steps(10)}, "must be shorter than the total"),
    ],
    ids=str,
)
def test_a_schedule_that_is_refused_leaves_nothing_behind(options: dict[str, Any], words: str) -> None:
    optimizer = sgd(0.1)
    with pytest.raises(ValueError, match=words):
        ProgressLR(optimizer, lr.linear(), **{"total": steps(10), **options})
    assert hooks_of(optimizer) == 0
    assert "initial_lr" not in optimizer.param_groups[0]


def test_a_gain_clock_in_a_run_that_measures_no_noise() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    batches = AdaptiveBatch(model, optimizer, Constant(8), micro_batch_size=4)
    with pytest.raises(ValueError, match=r"gain_steps: pass measure=Measure\(monitor=True\) or lr_rule='gain'"):
        ProgressLR(optimizer, lr.linear(), batches, total=examples(100), clock="gain")


# --- copies ---------------------------------------------------------------------------------------------------------


def pickled(schedule: ProgressLR) -> ProgressLR:
    return pickle.loads(pickle.dumps(schedule))  # type: ignore[no-any-return]


@pytest.mark.parametrize("copied", [pickled, copy.deepcopy], ids=["pickle", "deepcopy"])
def test_a_copy_goes_on_by_itself(copied: Any) -> None:
    """It has an optimizer of its own, and counts the steps of that one."""
    optimizer = sgd()
    schedule = ProgressLR(optimizer, lr.wsd(cooldown=0.5), total=steps(10), warmup=steps(2))
    for _ in range(4):
        optimizer.step()
        schedule.step()
    other = copied(schedule)
    assert other.state_dict() == schedule.state_dict()
    assert other.optimizer is not optimizer
    for _ in range(4):
        other.optimizer.step()
        other.step()
    assert schedule.state_dict()["steps"] == 4
    assert other.state_dict()["steps"] == 8
    assert other.get_last_lr() == [pytest.approx(0.1 * 0.5)]
    for _ in range(4):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == other.get_last_lr()


# --- rates that are tensors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("clock", ["total", "gain"])
def test_a_tensor_rate_under_every_clock_and_a_changed_total(clock: Any) -> None:
    number, tensor = sgd(0.1), sgd(torch.tensor(0.1, dtype=torch.float64))
    held = tensor.param_groups[0]["lr"]
    rates = []
    for optimizer in (number, tensor):
        run = Run([16] * 10 + [64] * 10)
        schedule = ProgressLR(optimizer, lr.cosine(), run, total=examples(800), warmup=steps(3), clock=clock)
        first = drive(optimizer, schedule, run, 12)
        schedule.set_total(examples(1200))
        schedule.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
        rates.append(first + drive(optimizer, schedule, run))
    assert rates[1] == pytest.approx(rates[0], rel=1e-12)
    assert tensor.param_groups[0]["lr"] is held
    assert isinstance(held, Tensor)


@pytest.mark.parametrize("options", [{"capturable": False, "foreach": False}, {"fused": True}], ids=str)
def test_a_tensor_rate_in_a_run_is_the_rate_as_a_number(options: dict[str, Any], tmp_path: Path) -> None:
    """With the batch factor and the followers of a growing batch on it; weights to the last digits of float64."""
    ends = []
    for rate in (0.01, torch.tensor(0.01, dtype=torch.float64)):
        model = network(dtype=torch.float64)
        optimizer = AdamW(model.parameters(), lr=rate, weight_decay=0.1, **options)
        batches = AdaptiveBatch(
            model,
            optimizer,
            Seesaw(8, lr.linear(floor=0.1), examples(400)),
            micro_batch_size=4,
            lr_rule="sqrt",
            follow=("betas", "eps", "weight_decay"),
        )
        schedule = ProgressLR(optimizer, lr.constant(), batches, total=examples(400), warmup=steps(4))
        order = GlobalOrder(regression(200, dtype=torch.float64), seed=2)
        train(batches, model, optimizer, order, until=examples(400), schedule=schedule)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert type(optimizer.param_groups[0]["lr"]) is type(rate)
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.01)
    assert torch.allclose(ends[0], ends[1], rtol=1e-10, atol=1e-12)


# --- saved and loaded with the run ----------------------------------------------------------------------------------


def start(model: Any, *, kind: type[Optimizer] = Adam) -> tuple[Optimizer, AdaptiveBatch, ProgressLR, GlobalOrder]:
    optimizer = kind(model.parameters(), lr=0.01)  # type: ignore[call-arg]
    sizes = Stages(8, [Stage(examples(40), 16), Stage(examples(120), 48)])
    batches = AdaptiveBatch(
        model,
        optimizer,
        sizes,
        micro_batch_size=4,
        lr_rule="sqrt_gain",
        follow=("betas", "eps"),
        measure=Measure(monitor=True),
    )
    schedule = ProgressLR(optimizer, lr.cosine(), batches, total=examples(400), warmup=steps(4), clock="gain")
    return optimizer, batches, schedule, GlobalOrder(regression(200, dtype=torch.float64), seed=2)


@pytest.mark.parametrize("at", [24, 56, 168])
def test_a_resumed_run_with_followers_and_the_gain_clock_is_the_whole_one(at: int) -> None:
    whole = network(dtype=torch.float64)
    optimizer, batches, schedule, order = start(whole)
    train(batches, whole, optimizer, order, until=examples(400), schedule=schedule)

    model = network(dtype=torch.float64)
    parts = start(model)
    optimizer, batches, schedule, order = parts
    train(batches, model, optimizer, order, until=examples(at), schedule=schedule)
    file = io.BytesIO()
    torch.save([model.state_dict(), *(part.state_dict() for part in parts)], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)

    model = network(seed=9, dtype=torch.float64)
    parts = start(model)
    for part, state in zip((model, *parts), states, strict=True):
        part.load_state_dict(state)
    optimizer, batches, schedule, order = parts
    train(batches, model, optimizer, order, until=examples(400), schedule=schedule)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), whole.parameters(), strict=True))


# --- a shape of a user's own, and warm-ups as a share ---------------------------------------------------------------


def bent(progress: float) -> float:
    return 1.0 if progress < 0.5 else 2 * (1 - progress)


@pytest.mark.parametrize("clock", ["total", "gain"])
def test_a_function_as_a_shape_is_the_shape_of_its_values(clock: Any) -> None:
    rates = []
    for shape in (bent, lr.wsd(cooldown=0.5)):
        optimizer, run = sgd(), Run([64] * 6 + [16] * 6 + [256] * 2)
        schedule = ProgressLR(optimizer, shape, run, total=examples(900), warmup=steps(3), clock=clock)
        rates.append(drive(optimizer, schedule, run))
    assert rates[0] == pytest.approx(rates[1], rel=1e-12, abs=1e-17)


def test_a_function_is_recognized_on_resume_and_another_is_refused() -> None:
    optimizer, run = sgd(), Run([10] * 20)
    whole = drive(optimizer, ProgressLR(optimizer, bent, run, total=examples(200)), run)
    optimizer, run = sgd(), Run([10] * 20)
    schedule = ProgressLR(optimizer, bent, run, total=examples(200))
    first = drive(optimizer, schedule, run, 8)
    file = io.BytesIO()
    torch.save(schedule.state_dict(), file)
    file.seek(0)
    state, progress = torch.load(file, weights_only=True), run.progress

    optimizer, run = sgd(0.7), Run([10] * 20)
    schedule = ProgressLR(optimizer, lambda p: bent(p), run, total=examples(200))
    run.progress = progress
    schedule.load_state_dict(state)
    assert first + drive(optimizer, schedule, run) == whole
    other = ProgressLR(sgd(), lambda p: bent(p) ** 2, Run([10] * 20), total=examples(200))
    mine = other.state_dict()
    with pytest.raises(ValueError, match=r"function bent, which is 0\.992188 at progress 0\.5039, this run has F"):
        other.load_state_dict(state)
    assert other.state_dict() == mine


def test_a_function_that_is_no_shape_leaves_nothing_behind() -> None:
    optimizer = sgd()
    with pytest.raises(ValueError, match=r"must be finite and not negative, got -0\.00390625 at progress 0\.50"):
        ProgressLR(optimizer, lambda p: 0.5 - p, total=steps(10))
    assert hooks_of(optimizer) == 0
    assert "initial_lr" not in optimizer.param_groups[0]


def test_a_warmup_as_a_share_is_one_in_the_unit_of_the_total() -> None:
    rates = []
    for warmup in (0.1, examples(90)):
        optimizer, run = sgd(), Run([16] * 10 + [64] * 12)
        schedule = ProgressLR(optimizer, lr.linear(), run, total=examples(900), warmup=warmup)
        assert schedule.warmup == examples(90)
        rates.append(drive(optimizer, schedule, run))
    assert rates[0] == rates[1]
    assert ProgressLR(sgd(), lr.linear(), total=steps(10)).warmup is None
    assert ProgressLR(sgd(), lr.linear(), total=steps(10), warmup=0.0).factor() == 1.0


@pytest.mark.parametrize("at", [3, 12])
def test_a_share_stays_what_it_was_where_the_total_changes(at: int) -> None:
    """Of the first total, so that no rate jumps; and a run that is resumed with the new total takes it over."""
    optimizer, run = sgd(), Run([10] * 60)
    schedule = ProgressLR(optimizer, lr.linear(), run, total=examples(300), warmup=0.3)
    drive(optimizer, schedule, run, at)
    schedule.set_total(examples(600))
    assert schedule.warmup == examples(90)
    state, progress = schedule.state_dict(), run.progress
    rest = drive(optimizer, schedule, run)
    optimizer, run = sgd(), Run([10] * 60)
    schedule = ProgressLR(optimizer, lr.linear(), run, total=examples(600), warmup=0.3)
    run.progress = progress
    schedule.load_state_dict(state)
    assert schedule.warmup == examples(90)
    assert drive(optimizer, schedule, run) == rest
    for other in (0.2, None, examples(180)):
        schedule = ProgressLR(sgd(), lr.linear(), Run([10] * 60), total=examples(600), warmup=other)
        with pytest.raises(ValueError, match=r"warmup=\[90, 'examples'\], this run has"):
            schedule.load_state_dict(state)
