"""``ProgressLR`` as a scheduler of torch, and the batch factor that is on only while an update runs."""

from __future__ import annotations

import copy
import io
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.loops import network
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

from adabatch import ProgressLR, examples, lr, steps, tokens
from adabatch.batch import Duration, Progress
from adabatch.runtime.optimizers.step_hooks import StepHooks, StepOverrides


class Run:
    """A run whose batch grows: what ``ProgressLR`` reads of an ``AdaptiveBatch``."""

    def __init__(self, sizes: list[int], factors: list[float] | None = None) -> None:
        self.sizes = sizes
        self.factors = factors or [1.0] * len(sizes)
        self.progress = Progress()

    @property
    def progress_after_next(self) -> Progress:
        return self.progress.after(self.sizes[min(self.progress.steps, len(self.sizes) - 1)])

    @property
    def lr_factor(self) -> float:
        return self.factors[min(self.progress.steps, len(self.factors) - 1)]

    def advance(self) -> None:
        self.progress = self.progress_after_next


class Recorder(Optimizer):
    """Plain gradient descent that writes down the rates in force while it steps."""

    fails = False

    def __init__(self, parameters: Any, *, lr: float | Tensor) -> None:
        super().__init__(parameters, {"lr": lr})
        self.applied: list[list[float]] = []

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        if self.fails:
            raise RuntimeError("out of memory")
        self.applied.append([float(group["lr"]) for group in self.param_groups])
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p -= group["lr"] * p.grad


def two_groups(kind: type[Optimizer] = Recorder) -> Any:
    model = network()
    return kind([{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.01}], lr=0.1)  # type: ignore[call-arg]


def drive(optimizer: Any, schedule: LRScheduler, run: Run, count: int) -> list[list[float]]:
    """``count`` updates; what ``get_last_lr`` said before each."""
    said = []
    for _ in range(count):
        said.append([float(rate) for rate in schedule.get_last_lr()])
        optimizer.step()
        run.advance()
        schedule.step()
    return said


# --- ProgressLR -----------------------------------------------------------------------------------------------------


def test_it_is_a_torch_scheduler_and_its_rates_are_right_at_once() -> None:
    optimizer = two_groups()
    schedule = ProgressLR(optimizer, lr.linear(), Run([10]), total=examples(100), warmup=examples(40))
    assert isinstance(schedule, LRScheduler)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1 * 0.25, 0.01 * 0.25]
    assert schedule.get_last_lr() == [0.1 * 0.25, 0.01 * 0.25]
    assert schedule.base_lrs == [0.1, 0.01]


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=25),
    warmup=st.none() | st.integers(0, 8).map(steps) | st.integers(0, 99).map(examples),
    start=st.floats(0, 1),
    shape=st.sampled_from([lr.constant(), lr.linear(), lr.cosine(floor=0.1), lr.wsd(cooldown=0.3)]),
)
def test_the_rate_of_every_update_is_the_closed_form(
    sizes: list[int], warmup: Duration | None, start: float, shape: lr.Shape
) -> None:
    """Warm-up read at the right end of what an update consumes, the shape at the left end, over what was left."""
    optimizer, run, total = two_groups(), Run(sizes), 100
    schedule = ProgressLR(optimizer, shape, run, total=examples(total), warmup=warmup, warmup_start=start)
    said = drive(optimizer, schedule, run, len(sizes))
    assert optimizer.applied == said

    anchor = 0 if warmup is None else None
    for index, (rates, size) in enumerate(zip(optimizer.applied, sizes, strict=True)):
        consumed = sum(sizes[:index])
        in_steps = warmup is not None and warmup.unit == "steps"
        here, after = (index, index + 1) if in_steps else (consumed, consumed + size)
        if warmup is not None and here < warmup.count:
            factor = (start + (1 - start) * min(1.0, after / warmup.count)) * shape(0.0)
        else:
            if anchor is None:
                anchor = consumed if in_steps else warmup.count
            left = total - anchor
            factor = shape(min(1.0, (consumed - anchor) / left) if left > 0 else 1.0)
        assert rates == pytest.approx([0.1 * factor, 0.01 * factor], rel=1e-12)


def test_past_the_total_the_last_value_stays() -> None:
    optimizer, run = two_groups(), Run([30])
    schedule = ProgressLR(optimizer, lr.cosine(floor=0.5), run, total=examples(100))
    drive(optimizer, schedule, run, 8)
    assert [rates[0] for rates in optimizer.applied[4:]] == [0.05] * 4


def test_get_last_lr_includes_the_batch_factor_and_the_groups_do_not() -> None:
    optimizer, run = two_groups(), Run([10] * 4, [1.0, 2.0, 3.0, 4.0])
    schedule = ProgressLR(optimizer, lr.constant(), run, total=examples(100))
    hooks = StepHooks(
        optimizer, overrides=lambda: StepOverrides(run.lr_factor), skip=lambda: False, done=lambda *_: None
    )
    said = drive(optimizer, schedule, run, 4)
    assert optimizer.applied == said == [[0.1 * f, 0.01 * f] for f in (1.0, 2.0, 3.0, 4.0)]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.01]
    hooks.remove()


def test_calling_it_twice_or_after_a_skipped_update_changes_nothing() -> None:
    optimizer, run = two_groups(), Run([10])
    schedule = ProgressLR(optimizer, lr.linear(), run, total=examples(100), warmup=steps(3))
    drive(optimizer, schedule, run, 1)
    before = [group["lr"] for group in optimizer.param_groups]
    schedule.step()
    schedule.step()  # no update, no progress
    assert [group["lr"] for group in optimizer.param_groups] == before == schedule.get_last_lr()
    drive(optimizer, schedule, run, 6)
    once, other = two_groups(), Run([10])
    drive(once, ProgressLR(once, lr.linear(), other, total=examples(100), warmup=steps(3)), other, 7)
    assert optimizer.applied == once.applied


def test_without_a_source_it_counts_the_optimizers_steps() -> None:
    optimizer = two_groups()
    schedule = ProgressLR(optimizer, lr.linear(), total=steps(10))
    reference = two_groups()
    expected = LambdaLR(reference, lambda step: 1 - step / 10)
    for _ in range(10):
        optimizer.step()
        schedule.step()
        schedule.step()
        reference.step()
        expected.step()
    assert optimizer.applied == [pytest.approx(rates, rel=1e-12) for rates in reference.applied]


class Decayed(SGD):
    """An optimizer as many write it: a little more around the step of its parent, whose hooks run too."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_an_optimizer_that_calls_its_parents_step_is_counted_once() -> None:
    SGD(network().parameters(), lr=1.0)  # torch puts hooks on a class when its first instance is made
    optimizer = Decayed(network().parameters(), lr=1.0)
    schedule = ProgressLR(optimizer, lr.linear(), total=steps(10))
    for count in range(1, 5):
        optimizer.step()
        schedule.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1 - count / 10, rel=1e-12)


def round_trip(state: dict[str, Any]) -> dict[str, Any]:
    """Through JSON, and through a file that torch loads without running code."""
    file = io.BytesIO()
    torch.save(json.loads(json.dumps(state, allow_nan=False)), file)
    file.seek(0)
    return torch.load(file, weights_only=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize("warmup", [None, steps(3), examples(35)], ids=str)
@pytest.mark.parametrize("at", range(8))
def test_a_loaded_schedule_goes_on_where_it_was_saved(warmup: Duration | None, at: int) -> None:
    sizes = [10, 10, 20, 5, 10, 20, 10, 10]
    options: dict[str, Any] = {"total": examples(100), "warmup": warmup, "warmup_start": 0.1}
    whole, run = two_groups(), Run(sizes)
    drive(whole, ProgressLR(whole, lr.cosine(), run, **options), run, 8)

    first, run = two_groups(), Run(sizes)
    schedule = ProgressLR(first, lr.cosine(), run, **options)
    drive(first, schedule, run, at)
    state, progress = round_trip(schedule.state_dict()), run.progress

    second, run = two_groups(), Run(sizes)
    for group in second.param_groups:
        group["lr"] = 99.0  # another base, to be replaced
    schedule = ProgressLR(second, lr.cosine(), run, **options)
    run.progress = progress
    schedule.load_state_dict(state)
    assert [group["lr"] for group in second.param_groups] == [group["lr"] for group in first.param_groups]
    drive(second, schedule, run, 8 - at)
    assert first.applied + second.applied == whole.applied


def test_counted_steps_are_saved_with_the_schedule() -> None:
    first = two_groups()
    schedule = ProgressLR(first, lr.linear(), total=steps(10))
    for _ in range(4):
        first.step()
        schedule.step()
    state = round_trip(schedule.state_dict())
    second = two_groups()
    schedule = ProgressLR(second, lr.linear(), total=steps(10))
    schedule.load_state_dict(state)
    second.step()
    assert second.applied == [pytest.approx([0.1 * 0.6, 0.01 * 0.6], rel=1e-12)]


def test_what_does_not_fit_a_saved_schedule() -> None:
    state = ProgressLR(two_groups(), lr.linear(), total=steps(10)).state_dict()
    with pytest.raises(ValueError, match=r"shape linear\(\), this run has cosine\(\)"):
        ProgressLR(two_groups(), lr.cosine(), total=steps(10)).load_state_dict(state)
    with pytest.raises(ValueError, match="2 parameter groups, the optimizer has 1"):
        ProgressLR(SGD(network().parameters(), lr=1.0), lr.linear(), total=steps(10)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"format 2.* upgrade adabatch"):
        ProgressLR(two_groups(), lr.linear(), total=steps(10)).load_state_dict({**state, "format": 2})


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"shape": "cosine"}, TypeError, r"must come from adabatch.lr"),
        ({"shape": lr.cosine}, TypeError, r"must come from adabatch.lr"),
        ({"total": 100}, TypeError, r"total must be a duration, such as adabatch.steps\(100\), got 100"),
        ({"warmup": 5}, TypeError, r"warmup must be a duration, such as adabatch.steps\(5\), got 5"),
        (
            {"warmup": 1.0},
            ValueError,
            r"a share of the total must lie in \[0, 1\), got 1.0: give a length as a duration",
        ),
        ({"warmup": -0.1}, ValueError, r"a share of the total must lie in \[0, 1\), got -0.1"),
        ({"warmup": math.nan}, ValueError, r"a share of the total must lie in \[0, 1\), got nan"),
        ({"total": 0.5}, TypeError, r"total must be a duration, such as adabatch.steps\(0.5\), got 0.5"),
        ({"total": steps(0)}, ValueError, r"total must have a length"),
        ({"warmup": steps(100)}, ValueError, r"warm-up of 100 steps must be shorter than the total of 100 steps"),
        ({"warmup_start": 1.5}, ValueError, r"warmup_start must be in \[0, 1\], got 1.5"),
        ({"total": examples(100)}, ValueError, r"100 examples cannot be counted without an AdaptiveBatch"),
        ({"warmup": tokens(10)}, ValueError, r"10 tokens cannot be counted without an AdaptiveBatch"),
        ({"total": tokens(10), "source": Run([1])}, ValueError, r"does not count tokens: pass tokens_per_example="),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_schedules(options: dict[str, Any], error: type[Exception], words: str) -> None:
    options = {"shape": lr.linear(), "total": steps(100), **options}
    with pytest.raises(error, match=words):
        ProgressLR(two_groups(), options.pop("shape"), options.pop("source", None), **options)


def test_a_rate_that_is_a_tensor_stays_the_same_tensor() -> None:
    """Capturable and compiled optimizers hold on to it."""
    rate = torch.tensor(0.1, dtype=torch.float64)
    run = Run([10] * 3, [1.0, 2.0, 4.0])
    optimizer = Recorder(network().parameters(), lr=rate)
    schedule = ProgressLR(optimizer, lr.linear(), run, total=examples(100))
    hooks = StepHooks(
        optimizer, overrides=lambda: StepOverrides(run.lr_factor), skip=lambda: False, done=lambda *_: None
    )
    said = drive(optimizer, schedule, run, 3)
    assert optimizer.param_groups[0]["lr"] is rate
    assert optimizer.applied == said == [pytest.approx([x]) for x in (0.1, 0.2 * 0.9, 0.4 * 0.8)]
    assert float(rate) == pytest.approx(0.1 * 0.7)
    state = round_trip(schedule.state_dict())
    schedule.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.1 * 0.7)
    (last,) = schedule.get_last_lr()
    assert isinstance(last, Tensor)
    last.zero_()
    assert float(rate) != 0
    assert float(schedule.get_last_lr()[0]) != 0
    hooks.remove()


def test_the_optimizer_can_be_copied() -> None:
    optimizer = two_groups(Adam)
    run = Run([10])
    schedule = ProgressLR(optimizer, lr.linear(), run, total=examples(100))
    hooks = StepHooks(optimizer, overrides=lambda: StepOverrides(2.0), skip=lambda: False, done=lambda *_: None)
    drive(optimizer, schedule, run, 2)
    copied = copy.deepcopy(optimizer)
    assert copied.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    copied.step()  # without the hooks of the original
    assert [group["lr"] for group in copied.param_groups] == [0.1 * 0.8, 0.01 * 0.8]
    hooks.remove()


# --- the batch factor beside schedulers of torch's own --------------------------------------------------------------


def lambda_schedule(optimizer: Optimizer) -> LRScheduler:
    return LambdaLR(optimizer, lambda step: 1 / (1 + step))


def recursive_schedule(optimizer: Optimizer) -> LRScheduler:
    """Multiplies the present rate of each group: what is left in there stays."""
    return CosineAnnealingLR(optimizer, T_max=12)


@pytest.mark.parametrize("make", [lambda_schedule, recursive_schedule])
def test_beside_a_scheduler_of_torchs_own_the_rate_is_its_rate_times_the_factor(make: Any) -> None:
    factors = [1.0, 1.0, math.sqrt(2), 2.0, 2.0, math.sqrt(8), 0.5, 3.0]
    optimizer, reference = two_groups(), two_groups()
    schedule, expected = make(optimizer), make(reference)
    present = iter(factors)
    hooks = StepHooks(
        optimizer, overrides=lambda: StepOverrides(next(present)), skip=lambda: False, done=lambda *_: None
    )
    for _ in factors:
        for each in (optimizer, reference):
            each.step()
        for scheduler in (schedule, expected):
            scheduler.step()
        # The factor is in no stored number, to the bit.
        assert schedule.state_dict() == expected.state_dict()
        assert optimizer.state_dict()["param_groups"] == reference.state_dict()["param_groups"]
    assert optimizer.applied == [
        [rate * factor for rate in rates] for rates, factor in zip(reference.applied, factors, strict=True)
    ]
    hooks.remove()


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1, dtype=torch.float64)], ids=["float", "tensor"])
def test_an_update_that_raises_leaves_no_factor_in_a_checkpoint_or_the_next_update(rate: Any) -> None:
    optimizer = Recorder(network().parameters(), lr=rate)
    hooks = StepHooks(optimizer, overrides=lambda: StepOverrides(8.0), skip=lambda: False, done=lambda *_: None)
    optimizer.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    saved = optimizer.state_dict()  # what an exception handler would save
    assert float(saved["param_groups"][0]["lr"]) == 0.1
    assert float(optimizer.param_groups[0]["lr"]) == 0.1
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    hooks.restore()  # what the next step of the loop does
    assert float(optimizer.param_groups[0]["lr"]) == 0.1
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    optimizer.fails = False
    optimizer.step()
    assert optimizer.applied == [[pytest.approx(0.8, rel=1e-12)]]
    with_failure = float(optimizer.param_groups[0]["lr"])
    hooks.remove()
    assert with_failure == float(optimizer.param_groups[0]["lr"]) == 0.1


def test_remove_takes_the_hooks_off_and_the_factor_with_them() -> None:
    optimizer = Recorder(network().parameters(), lr=0.1)
    hooks = StepHooks(optimizer, overrides=lambda: StepOverrides(8.0), skip=lambda: False, done=lambda *_: None)
    optimizer.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    hooks.remove()
    optimizer.fails = False
    optimizer.step()
    assert optimizer.applied == [[0.1]]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_state_dict_pre_hooks


def test_an_optimizer_that_calls_its_parents_step_gets_the_factor_once() -> None:
    SGD(network().parameters(), lr=1.0)
    model = nn.Linear(1, 1, bias=False)
    optimizer = Decayed(model.parameters(), lr=0.5)
    hooks = StepHooks(optimizer, overrides=lambda: StepOverrides(3.0), skip=lambda: False, done=lambda *_: None)
    before = model.weight.item()
    model(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    assert model.weight.item() == pytest.approx(before - 1.5)
    assert optimizer.param_groups[0]["lr"] == 0.5
    hooks.remove()


def test_a_skipped_update_leaves_weights_and_state_alone() -> None:
    model = nn.Linear(2, 1)
    optimizer = Adam(model.parameters(), lr=0.1)
    skips = [False, True, False]
    told = []
    hooks = StepHooks(
        optimizer,
        overrides=lambda: StepOverrides(1.0),
        skip=lambda: skips.pop(0),
        done=lambda _, rates, applied: told.append((rates, applied)),
    )
    for value in (1.0, float("nan"), 1.0):
        before = [p.detach().clone() for p in model.parameters()]
        counted = [float(state["step"]) for state in optimizer.state.values()]
        (model(torch.ones(1, 2)) * value).sum().backward()
        optimizer.step()
        if math.isnan(value):
            assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
            assert [float(state["step"]) for state in optimizer.state.values()] == counted
        optimizer.zero_grad()
    assert told == [([0.1], True), ([0.1], False), ([0.1], True)]
    assert all(torch.isfinite(p).all() for p in model.parameters())
    hooks.remove()
