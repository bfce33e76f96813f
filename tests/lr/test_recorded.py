"""Journals as arrays, schedules refined from them, bounds over their steps, and longer runs: from Python, no files."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from adabatch import lr
from adabatch.batch.plan import Progress, examples, gain_steps, steps
from adabatch.journal.writer import LINE_FORMAT
from adabatch.lr.bound import whole_units
from adabatch.lr.extend import steps_done
from adabatch.lr.journal_lines import JOURNAL_FORMAT


def line(index: int, **changes: Any) -> str:
    entry: dict[str, Any] = {
        "format": 1,
        "step": index,
        "plan": {"global_batch_size": 8},
        "moments": {"grad_sq": 4.0},
        "norms": {"l2": 2.0, "l1": 5.0},
        "averages": {"noise": 32.0, "signal": 1.0},
        "lr": {"base": [0.1], "shape": [1 - index / 10], "factor": 1.0},
        "applied": True,
    }
    return json.dumps(entry | changes)


def journal(num: int = 6, **changes: Any) -> list[str]:
    return [line(index, **changes) for index in range(num)]


def test_the_format_is_that_of_the_journal() -> None:
    assert JOURNAL_FORMAT == LINE_FORMAT


def test_lines_become_arrays_of_the_applied_steps() -> None:
    lines = [*journal(3), line(3, applied=False), "", line(4, norms={"l2": 3.0}, plan={"global_batch_size": 16})]
    run = lr.read_recorded([*lines, '{"format": 1, "st'])
    assert run.num_steps == 4
    assert run.line.tolist() == [1, 2, 3, 6]
    assert run.batch.tolist() == [8, 8, 8, 16]
    assert run.l2.tolist() == [2, 2, 2, 3]
    assert run.l1.tolist()[:3] == [5, 5, 5]
    assert math.isnan(run.l1[3])
    assert run.base_lrs == (0.1,)
    assert run.edges("examples", 8).tolist() == [0, 8, 16, 24, 40]
    assert run.edges("steps", 8).tolist() == [0, 1, 2, 3, 4]
    # (32 / 8 + 1) / (32 / 16 + 1) for the step of two reference batches
    assert run.edges("gain_steps", 8).tolist() == pytest.approx([0, 1, 2, 3, 3 + 5 / 3])
    assert run.factors("linear", 8).tolist() == [1, 1, 1, 2]
    assert run.norms("l1").for_each(4).tolist() == [5, 5, 5, 5]
    assert lr.read_recorded("\n".join(lines).splitlines()).num_steps == 4


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "mine holds no applied step"),
        (["{", line(0)], r"mine, line 1, is not JSON and not the last line"),
        (["[1]"], "mine, line 1, is not a JSON object"),
        ([line(0, format=2)], "mine, line 1, has format 2"),
        ([line(0, plan=None)], "mine, line 1, is not a step of a run"),
        ([line(0, lr={"factor": 0.0})], "the batch factor must be positive, got 0.0"),
    ],
)
def test_what_is_no_journal_is_named_with_its_source(lines: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        lr.read_recorded(lines, "mine")


def test_lines_that_are_missing_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    whole_run = [line(index, examples=8 * index, run="0123456789ab") for index in range(12)]
    assert lr.read_recorded([*whole_run[:3], *whole_run[5:8], *whole_run[10:]], "mine").num_steps == 8
    (said,) = caplog.messages
    assert said.startswith("mine, line 4, begins at 40 examples, and the line before ends at 24: the lines between")
    lr.read_recorded(whole_run[4:])  # the beginning is in another file, or was cut off with care
    assert len(caplog.messages) == 1


def test_norms_that_cannot_be_used() -> None:
    with pytest.raises(ValueError, match=r"holds no l1 norms of the gradient: run it again with Measure\(l1=True\)"):
        lr.read_recorded(journal(norms={"l2": 1.0})).norms("l1")
    with pytest.raises(ValueError, match="line 1: the l2 norm of the gradient is 0"):
        lr.read_recorded(journal(norms={"l2": 0.0})).norms("l2")
    with pytest.raises(ValueError, match="holds one l2 norm"):
        lr.read_recorded(journal(1)).norms("l2")
    with pytest.raises(ValueError, match="holds no averages of noise and signal, which the rule 'gain' reads"):
        lr.read_recorded(journal(averages=None)).factors("gain", 8)


# --- bounds over the steps of a run ---------------------------------------------------------------------------------


def test_over_equal_steps_the_bound_is_the_plain_one() -> None:
    shape = lr.wsd(cooldown=0.3)
    found = lr.schedule_bound(shape, lr.Horizon.of_equal_steps(200), warmup_steps=20)
    assert found.terms == lr.bound_terms(lr.discretize(shape, 200, warmup_steps=20))
    run = lr.read_recorded(journal(200))
    of_run = lr.schedule_bound(shape, lr.Horizon.of_run(run, "steps", 8), warmup_steps=20)
    assert of_run.terms.best_base_lr == pytest.approx(found.terms.best_base_lr / 2), "norms of 2"
    with pytest.raises(ValueError, match=r"warmup_steps must lie in \[0, 199\] for 200 steps, got 200"):
        lr.schedule_bound(shape, lr.Horizon.of_equal_steps(200), warmup_steps=200)
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        lr.Horizon.of_equal_steps(0)


def test_the_bound_over_time_ends_on_the_bound() -> None:
    found = lr.schedule_bound(lr.linear(), lr.Horizon.of_equal_steps(300))
    times, bounds = found.over_time(found.terms.best_base_lr, points=20)
    assert times[-1] == 300
    assert bounds[-1] == pytest.approx(found.terms.best)
    assert len(times) == len(bounds) <= 20
    assert bounds[3] == pytest.approx(lr.bound(found.factors[: int(times[3])], base_lr=found.terms.best_base_lr))


def test_the_closed_form_between_linear_cooldowns() -> None:
    for source, target in ((lr.wsd(cooldown=0.2), lr.linear()), (lr.linear(), lr.wsd(cooldown=0.1))):
        found = lr.linear_cooldown_ratio(source, target, 20_000, 80_000)
        exact = lr.transfer(1.0, source, target, num_steps=20_000, target_steps=80_000)
        assert found == pytest.approx(exact, rel=1e-3)
        assert lr.linear_cooldown_ratio(source, target, 100) == pytest.approx(2 * found)
    for other in (lr.cosine(), lr.wsd(cooldown=0.2, decay="1-sqrt"), lr.linear(floor=0.1)):
        assert lr.linear_cooldown_ratio(other, lr.linear(), 100) is None
    assert lr.linear_cooldown_ratio(lr.linear(), lr.FunctionShape(lambda p: 1 - p), 100) is None


# --- a schedule from a run ------------------------------------------------------------------------------------------


def test_at_a_constant_batch_a_refined_run_is_the_refined_norms() -> None:
    norms = (2 + np.sin(np.arange(60) / 9)).tolist()
    run = lr.read_recorded([line(k, norms={"l2": g, "l1": g**2}) for k, g in enumerate(norms)])
    for kind, values in (("sgd", norms), ("adam", [g**2 for g in norms])):
        made = lr.refine_run(run, kind, smoothing=0.2)  # type: ignore[arg-type]
        expected = lr.refine(values, kind, smoothing=0.2)  # type: ignore[arg-type]
        assert made.shape(np.linspace(0, 1, 60)) == pytest.approx(expected(np.linspace(0, 1, 60)), rel=1e-5, abs=1e-6)
        assert made.window == 13
    for wrong, words in (({"smoothing": 1.5}, "smoothing must lie in"), ({"length": 1}, "length must be at least 2")):
        with pytest.raises(ValueError, match=words):
            lr.refine_run(run, **wrong)


def test_the_bounds_of_a_refined_run_are_over_its_own_steps() -> None:
    lines = [line(k, plan={"global_batch_size": 8 * (1 + k // 20)}, norms={"l2": 1 + k / 40}) for k in range(60)]
    run = lr.read_recorded([text.replace(f"{1 - k / 10}", f"{1 - k / 60}") for k, text in enumerate(lines)])
    made = lr.refine_run(run)
    bounds = lr.refined_bounds(run, made)
    assert list(bounds) == ["the run's own", "refined", "linear"]
    horizon = lr.Horizon.of_run(run, "examples", 8)
    assert bounds["linear"] == lr.schedule_bound(lr.linear(), horizon).terms
    assert bounds["refined"].best <= bounds["linear"].best * (1 + 1e-6)
    untold = lr.read_recorded(journal(lr={}))
    assert lr.refined_bounds(untold, lr.refine_run(untold)) == {}


# --- a longer run ---------------------------------------------------------------------------------------------------


def saved(**changes: Any) -> lr.SavedSchedule:
    fields: dict[str, Any] = {
        "source": "runs/first",
        "shape": lr.wsd(cooldown=0.2),
        "base_lrs": (0.1,),
        "total": examples(8000),
        "warmup": 0.0,
        "changed": False,
        "clock": "examples",
        "progress": Progress(examples=8000, steps=1000),
        "reference": 8,
    }
    return lr.SavedSchedule(**(fields | changes))


def test_both_extensions_keep_the_base_learning_rate_the_best() -> None:
    finished = lr.finished_run(saved())
    assert (finished.num_steps, finished.steps_of(examples(16000))) == (1000, 2000)
    options = lr.extended_schedules(finished, examples(16000))
    own = lr.schedule_bound(lr.wsd(cooldown=0.2), lr.Horizon.of_equal_steps(1000)).terms.best_base_lr
    for name, option in options.items():
        longer = lr.schedule_bound(option.shape, lr.Horizon.of_equal_steps(2000)).terms.best_base_lr
        if name == "unchanged":
            assert longer < 0.8 * own
        else:
            assert longer == pytest.approx(own, rel=5e-3)
        before = np.linspace(0, option.resume / 16000, 50, endpoint=False)
        assert option.shape(before) == pytest.approx(np.ones(50)), "up to there it is the finished run's schedule"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": lr.cosine()}, r"only a wsd shape with a cooldown between 0 and 1 .* the run has cosine\(\)"),
        ({"shape": lr.wsd(cooldown=0.2, floor=0.1)}, "only a wsd shape"),
        ({"clock": "gain_steps"}, "the run has the gain clock"),
        ({"warmup": None}, "the run was still warming up"),
        ({"changed": True}, "the total was changed during the run"),
        ({"progress": Progress()}, "the run has not begun"),
    ],
)
def test_runs_that_cannot_be_extended(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"runs/first: {words}"):
        lr.finished_run(saved(**changes))


def test_a_run_in_gain_steps_can() -> None:
    progress = Progress(examples=8000, steps=1000, gain_steps=500.0)
    finished = lr.finished_run(saved(clock="gain_steps", total=gain_steps(500), progress=progress))
    assert finished.num_steps == 1000


def test_how_many_steps_a_run_had_done() -> None:
    sizes = [8] * 10 + [16] * 5
    run = lr.read_recorded([line(k, plan={"global_batch_size": size}) for k, size in enumerate(sizes)])
    state = saved(progress=Progress(examples=160, steps=15), total=examples(200))
    assert [steps_done(state, run, count) for count in (0, 40, 80, 95, 96, 160)] == [0, 5, 10, 10, 11, 15]
    assert steps_done(state, run, 170) is None
    assert steps_done(saved(total=steps(50)), run, 7.0) == 7
    assert whole_units(2.9999999) == 3
