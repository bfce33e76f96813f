"""The numbers of a report: what a hand-made journal says is what the summary, the flags and the what-if say."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from adabatch.batch import adaptive_limit
from adabatch.report.evaluations import Extremes, extremes
from adabatch.report.heat import layer_bins
from adabatch.report.page import MOST_CHANGES, Reported, drawn, numbers, page, report_on, thinned
from adabatch.report.steps import RunSteps, read_steps
from adabatch.report.summary import (
    RunSettings,
    betas_of,
    changes,
    criterion_factor,
    differing_settings,
    flags,
    flat,
    noise_band,
    report_settings,
    summarize,
    time_before,
    time_constant,
)
from adabatch.report.what_if import Choice, constant_at_equal_examples, recorded, segments, what_if

ETA = 0.5
REST = (1 - ETA * ETA) / (ETA * ETA)


def line(step: int, examples: int, batch: int, *, scale: float = 100.0, **other) -> dict:
    """A line of a run under ``NormTest(0.5)``, whose averages have the noise scale ``scale``."""
    measured = {"noise": scale, "signal": 1.0, "noise_scale": scale}
    factor = math.sqrt(batch / 16)
    return {
        "format": 1,
        "step": step,
        "examples": examples,
        "plan": {"micro_batch_size": 8, "accumulation_steps": batch // 16, "dp_size": 2, "global_batch_size": batch},
        "loss": 2.0 / (1 + step),
        "moments": {
            **measured,
            "part_sq": 1.0,
            "part_size": 8.0,
            "grad_sq": 1.0,
            "num_examples": batch,
            "num_parts": 2,
        },
        "averages": measured,
        "wanted": REST * scale,
        "low": REST * scale / 2,
        "high": REST * scale * 2,
        "freedom": 9.0,
        "next": batch,
        "reason": "within hysteresis",
        "lr": {"base": [0.1], "shape": [1.0], "factor": factor, "applied": [0.1 * factor]},
        "applied": True,
        "run": "a",
        **other,
    }


def run_of(*steps: dict, name: str = "hand-made") -> RunSteps:
    """Steps of a run from their batches and what else they say; they follow each other."""
    examples, lines = 0, []
    for number, step in enumerate(steps):
        later = steps[number + 1]["batch"] if number + 1 < len(steps) else step["batch"]
        lines.append(line(number, examples, **{"next": later, **step}))
        examples += step["batch"]
    return read_steps(lines, name)


GROWN = [{"batch": 16, "scale": 80.0}, {"batch": 16, "scale": 100.0, "reason": "grow"}] + [
    {"batch": 64, "scale": 100.0 + 20 * i} for i in range(4)
]


def kinds(run: RunSteps, settings: RunSettings | None = None) -> dict[str, str]:
    return {flag.kind: flag.text for flag in flags(run, settings or RunSettings())}


def test_totals():
    found = summarize(run_of(*GROWN))
    assert (found.num_steps, found.num_examples, found.num_changes, found.num_left_out) == (6, 288, 1, 0)
    assert (found.mean_batch, found.smallest_batch, found.largest_batch) == (48, 16, 64)
    worth = [1 / (1 + 16 / 80), 1 / (1 + 16 / 100), *(1 / (1 + 64 / (100 + 20 * i)) for i in range(4))]
    assert found.efficiency == pytest.approx(np.average(worth, weights=[16, 16, 64, 64, 64, 64]), rel=1e-12)
    scales, sizes = [80.0, 100, *(100 + 20 * i for i in range(4))], [16, 16, 64, 64, 64, 64]
    assert found.adaptive_limit == pytest.approx(adaptive_limit(scales, sizes), rel=1e-12)
    assert 1 < found.adaptive_limit < 1.1
    assert found.known == 1
    assert found.last_loss == found.best_loss == pytest.approx(2 / 6)
    assert found.probed == 1
    assert found.accumulated == pytest.approx(256 / 288)
    assert math.isnan(found.seconds)


def test_a_run_without_measurements_has_totals_and_says_so():
    run = run_of(*[{"batch": 16, "moments": None, "averages": None, "wanted": None, "low": None, "high": None}] * 3)
    found = summarize(run)
    assert math.isnan(found.efficiency)
    assert math.isnan(found.adaptive_limit)
    assert found.known == found.probed == 0
    assert "Measure(monitor=True)" in kinds(run)["noise_not_measured"]
    assert report_on(run).outcomes == ()
    with pytest.raises(ValueError, match=r"has no noise scale.*monitor"):
        report_on(run, choices=[Choice("eta", 0.5)])


def evaluated(step: int, examples: int, **metrics: float | None) -> dict:
    return {"format": 1, "step": step, "examples": examples, "evaluation": metrics}


def test_evaluations_have_a_best_and_a_last_value():
    steps = [line(0, 0, 32), line(1, 32, 32), line(2, 64, 32)]
    lines = [
        steps[0],
        evaluated(1, 32, accuracy=0.5, loss=2.0),
        steps[1],
        evaluated(2, 64, accuracy=0.8, loss=None, val_perplexity=3.0),
        steps[2],
        evaluated(3, 96, accuracy=0.1, loss=1.0),
        evaluated(3, 96, accuracy=0.7, loss=1.0),  # the run was started again at its end
    ]
    run = read_steps(lines, "evaluated")
    assert run.num_steps == 3
    assert [metric.name for metric in run.metrics] == ["loss", "accuracy", "val_perplexity"]
    found = {metric.name: extremes(metric) for metric in run.metrics}
    assert found["loss"] == Extremes(1.0, 96, 1.0, 96, 3, True)
    assert found["accuracy"] == Extremes(0.8, 64, 0.7, 96, 3, False)
    assert found["val_perplexity"] == Extremes(3.0, 64, 3.0, 64, 1, True)
    never = extremes(read_steps([steps[0], evaluated(1, 32, f1=None)], "never").metrics[0])
    assert math.isnan(never.best)
    assert math.isnan(never.last)
    (told,) = numbers([report_on(run)])["runs"]
    assert told["evaluations"]["accuracy"]["best_at"] == 64
    assert numbers([report_on(read_steps(steps, "plain"))])["runs"][0]["evaluations"] == {}


def test_changes_are_sentences():
    (change,) = changes(run_of(*GROWN))
    assert (change.step, change.examples, change.before, change.after, change.reason) == (1, 16, 16, 64, "grow")
    assert change.text == (
        "After step 1 the batch grew from 16 to 64 examples: the criterion asked for 300 (between 150 and 600)."
    )


@pytest.mark.parametrize(
    ("said", "end"),
    [
        (
            {"reason": "grow", "wanted": None, "low": 40.0, "high": None},
            "no signal was seen, and at least 40 were asked",
        ),
        ({"reason": "grow", "high": None}, "asked for 300 (at least 150)."),
        ({"reason": "scheduled"}, "as its schedule says."),
        ({"reason": "at limit"}, "to stay within its limits."),
        ({"reason": "some new word"}, "(some new word)."),
    ],
)
def test_each_reason_has_its_sentence(said, end):
    run = run_of({"batch": 16, **said}, {"batch": 64})
    assert end in changes(run)[0].text


def test_the_share_at_the_largest_limit():
    run = run_of(*[{"batch": 24}] * 4, *[{"batch": 76}] * 4)
    flag = next(flag for flag in flags(run, RunSettings(limits=(16, 76))) if flag.kind == "at_limits_max")
    assert flag.share == pytest.approx(0.76)
    assert flag.text.startswith("76 % of the examples ran at limits.max (76).")
    assert "300 (median)" in flag.text
    assert flag.level == "warning"
    # Without a config the journal's own word is needed, as the largest batch may be what was asked for.
    assert "at_limits_max" not in kinds(run)
    held = run_of(*[{"batch": 24}] * 4, *[{"batch": 76, "reason": "at limit"}] * 4)
    assert "76 % of the examples" in kinds(held)["at_limits_max"]


def test_updates_left_out():
    left = {"batch": 16, "applied": False, "lr": None}
    run = run_of({"batch": 16}, left, left, {"batch": 16})
    assert kinds(run)["updates_left_out"].startswith("2 updates were left out, the first at step 1")
    assert summarize(run).num_left_out == 2
    assert kinds(run_of({"batch": 16}, left))["updates_left_out"].startswith("1 update was left out")
    assert "updates_left_out" not in kinds(run_of(*GROWN))


def test_rules_outside_their_range():
    run = run_of(*[{"batch": 16, "scale": 40.0}] * 3, *[{"batch": 64, "scale": 40.0}] * 3)
    text = kinds(run)["rule_outside_its_range"]  # the factors say that it is sqrt
    assert text.startswith("The rule sqrt was used outside the noise-dominated range for 80 % of the examples.")
    assert "'sqrt_gain'" in text
    assert "'gain'" in kinds(run, RunSettings(lr_rule="linear"))["rule_outside_its_range"]
    assert "rule_outside_its_range" not in kinds(run, RunSettings(lr_rule="sqrt_gain"))
    assert "factor of 4" in kinds(run, RunSettings(lr_rule="none"))["rate_did_not_follow"]
    past = next(flag for flag in flags(run, RunSettings()) if flag.kind == "past_the_noise_scale")
    assert past.share == pytest.approx(0.8)
    below = run_of(*[{"batch": 16, "scale": 400.0}] * 3, *[{"batch": 64, "scale": 400.0}] * 3)
    assert not {"rule_outside_its_range", "past_the_noise_scale"} & set(kinds(below))


def test_floors_memory_and_failures_are_told():
    run = run_of(
        {"batch": 32},
        {"batch": 32, "beta_floors": {"beta2": 0.95}, "out_of_memory": 64},
        {"batch": 32, "reason": "not finite"},
        {"batch": 32, "reason": "no signal"},
    )
    found = kinds(run)
    assert found["beta2_at_floor"] == "beta2 was at its floor (0.95) for 25 % of the examples."
    assert "at step 1" in found["out_of_memory"]
    assert found["not_finite"].startswith("1 step had")
    assert found["no_signal"].startswith("In 25 % of the decisions")


def test_the_band_is_that_of_the_wanted_batch_turned_back():
    run = run_of(*GROWN)
    assert criterion_factor(run) == (pytest.approx(REST), 1)
    low, high = noise_band(run)
    np.testing.assert_allclose(low, run.noise_scale / 2)
    np.testing.assert_allclose(high, run.noise_scale * 2)
    priced = run_of(*[{**each, "wanted": math.sqrt(each["scale"] * 64)} for each in GROWN])
    assert criterion_factor(priced) == (pytest.approx(8.0), 2)
    strange = run_of(*[{**each, "wanted": 50.0 + i} for i, each in enumerate(GROWN)])
    assert noise_band(strange) is None


def test_tau_and_betas_follow_the_config():
    run = run_of(*GROWN)
    settings = RunSettings(weight_decay=0.1, betas=(0.9, 0.99), follow=("betas",))
    np.testing.assert_allclose(time_constant(run, settings), run.batch / (run.applied_lr[:, 0] * 0.1 * 288))
    following = settings._replace(follow=("betas", "weight_decay"))
    decay = 0.1 * (run.batch / 16) / run.factor
    np.testing.assert_allclose(time_constant(run, following), run.batch / (run.applied_lr[:, 0] * decay * 288))
    betas = betas_of(run, settings)
    np.testing.assert_allclose(betas[0], [0.9, 0.99])
    np.testing.assert_allclose(betas[-1], [0.9**4, 0.99**4])
    high = settings._replace(beta_floors=(0.8, 0.98))
    np.testing.assert_allclose(betas_of(run, high)[-1], [0.8, 0.98])
    assert time_constant(run, RunSettings()) is None
    assert betas_of(run, RunSettings()) is None


def test_time_only_where_most_steps_have_it():
    run = run_of(*[{"batch": 16, "seconds": 2.0}] * 3, {"batch": 16})
    assert time_before(run).tolist() == [0, 2, 4, 6]
    assert summarize(run).seconds == 8
    assert time_before(run_of(*GROWN)) is None


PLANS = [
    {"micro_batch_size": size, "accumulation_steps": 1, "dp_size": 1, "global_batch_size": size} for size in (8, 32)
]


@pytest.mark.parametrize("says_whose", [True, False])
def test_a_time_is_that_of_the_step_that_took_it(says_whose):
    """It is known one measured step late; before journals said whose it was, too. The third step was not measured."""
    plans = [PLANS[0]] * 4 + [PLANS[1]] * 3
    timed = [None, None, None, (PLANS[0], 1.0), (PLANS[0], 1.5), None, (PLANS[1], 4.0)]
    steps = []
    for plan, late in zip(plans, timed, strict=True):
        step = {"batch": plan["global_batch_size"], "plan": plan}
        if late is not None:
            step |= {"seconds": late[1], "timed_plan": late[0]} if says_whose else {"seconds": late[1]}
        steps.append(step)
    steps[2]["moments"] = None
    found = run_of(*steps).seconds
    first = 2 if says_whose else 1
    expected = [math.nan] * 7
    expected[first], expected[3], expected[5] = 1.0, 1.5, 4.0
    np.testing.assert_array_equal(found, expected)


def test_a_time_whose_step_is_in_no_line_is_left_out():
    lost = {"seconds": 4.0, "timed_plan": PLANS[1]}
    assert np.isnan(run_of(*[{"batch": 8, "plan": PLANS[0], **lost}] * 2).seconds).all()


def test_settings_come_from_nested_and_flat_configs():
    nested = {
        "limits": {"min": 16, "max": {"class_path": "adabatch.LinearRamp"}},
        "criterion": {"class_path": "adabatch.NormTest", "init_args": {"eta": 0.5}},
        "optimizer": {"init_args": {"weight_decay": 0.1, "betas": [0.9, 0.95]}},
        "follow": ["betas"],
        "lr_rule": "sqrt",
    }
    found = report_settings(flat(nested))
    assert found.limits == (16, None)  # a limit that moves is no number
    assert (found.criterion, found.lr_rule, found.betas) == ("NormTest", "sqrt", (0.9, 0.95))
    assert report_settings({}) == RunSettings()
    other = {**flat(nested), "lr_rule": "gain", "seed": 1}
    assert differing_settings([flat(nested), other]) == {"lr_rule": ["sqrt", "gain"], "seed": [None, 1]}


# --- what if ---


def test_what_ran_is_what_its_own_batches_would_have_cost():
    run = run_of(*[{"batch": 48, "scale": 100.0 + i} for i in range(5)])
    mine, same = recorded(run), what_if(run, Choice("constant", 48))
    assert (same.steps, same.examples, same.efficiency) == pytest.approx((mine.steps, mine.examples, mine.efficiency))
    assert same.steps_at_equal_examples == pytest.approx(5)


def test_another_eta_at_one_noise_scale():
    run = run_of(*[{"batch": 50, "scale": 100.0}] * 10)
    progress = 500 / (1 + 0.5)
    found = what_if(run, Choice("eta", 0.8), price=10.0)
    batch = 100 * (1 - 0.64) / 0.64
    assert found.efficiency == pytest.approx(0.64)  # as the norm test promises
    assert found.examples == pytest.approx(progress / 0.64)
    assert found.steps == pytest.approx(progress / 0.64 / batch)
    assert found.mean_batch == pytest.approx(batch)
    assert found.steps_at_equal_examples == pytest.approx(500 / batch)
    assert found.cost == pytest.approx(found.examples + 10 * found.steps)


def test_the_price_of_a_step_is_paid_least_by_its_own_batch():
    run = run_of(*[{"batch": 50, "scale": 60.0 + 30 * i} for i in range(8)])
    best = what_if(run, Choice("step_price", 40.0), price=40.0).cost
    others = [what_if(run, Choice("multiple", m), price=40.0).cost for m in (0.2, 0.4, 0.6, 0.8, 1.0, 2.0)]
    others += [what_if(run, Choice("constant", size), price=40.0).cost for size in (20, 50, 80, 200)]
    assert best < min(others)


def test_limits_hold_a_criterion_and_no_constant():
    run = run_of(*[{"batch": 50, "scale": 100.0}] * 4)
    assert what_if(run, Choice("multiple", 9.0), limits=(16, 64)).mean_batch == pytest.approx(64)
    assert what_if(run, Choice("multiple", 0.01), limits=(16, 64)).mean_batch == pytest.approx(16)
    assert what_if(run, Choice("constant", 500), limits=(16, 64)).mean_batch == pytest.approx(500)


def test_the_constant_batch_of_equal_examples_takes_as_many_and_more_steps():
    # Of all batches those in proportion to the root of the noise scale need the fewest steps (McCandlish, appendix D).
    run = run_of(*[{"batch": 16 * i, "scale": 40.0 * i * i} for i in range(1, 10)])
    choice = constant_at_equal_examples(run)
    found = what_if(run, choice)
    assert found.examples == pytest.approx(run.num_examples)
    assert found.steps > recorded(run).steps


def test_segments_keep_what_constants_and_multiples_cost():
    run = run_of(*[{"batch": 16 + 8 * (i % 5), "scale": 50.0 + i} for i in range(400)])
    fine, coarse = segments(run), segments(run, at_most=20)
    assert len(coarse.steps) == 20
    for name in ("examples", "steps", "progress"):
        assert getattr(coarse, name).sum() == pytest.approx(getattr(fine, name).sum())
    assert (coarse.progress / coarse.noise_scale).sum() == pytest.approx((fine.progress / fine.noise_scale).sum())


def test_a_missing_noise_scale_is_that_before():
    silent = {"averages": {"noise": 50.0, "signal": -1.0, "noise_scale": None}}
    run = run_of({"batch": 16, **silent}, {"batch": 16, "scale": 70.0}, {"batch": 16, **silent})
    assert segments(run).noise_scale.tolist() == [70, 70, 70]


@pytest.mark.parametrize(
    "text", ["eta", "eta=", "eta=1", "eta=0", "eta=x", "wish=3", "constant=0.5", "multiple=-1", "eta=nan"]
)
def test_choices_outside_their_range_are_refused(text):
    with pytest.raises(ValueError, match=r"eta|constant|one of|multiple"):
        Choice.parse(text)


def test_choices_have_names():
    assert Choice.parse("eta=0.7").name == "norm test, eta 0.7"
    assert Choice.parse("constant=1024").name == "constant 1,024"


# --- layers, thinning, the page ---


def with_layers(number: int, steps: int = 30) -> RunSteps:
    layers = {f"layer.{i}": {"noise": 10.0 + i, "signal": 1.0, "noise_scale": 10.0 + i} for i in range(number)}
    layers["layer.0"] = {"noise": 10.0, "signal": -1.0, "noise_scale": None}
    return run_of(*[{"batch": 16, "layers": layers}] * steps)


def test_layers_in_cells():
    heat = layer_bins(with_layers(5), 1000)
    assert heat["names"][0] == "layer.4"
    assert heat["values"].shape == (5, 30)
    np.testing.assert_allclose(heat["values"][0], 14.0)
    np.testing.assert_allclose(heat["values"][heat["names"].index("layer.0")], -1)
    np.testing.assert_allclose(heat["shares"].sum(), 1.0)
    few = layer_bins(with_layers(50), 300)
    assert len(few["names"]) == 10
    assert few["left_out"] == 40


def test_thinning_keeps_ends_and_changes():
    run = run_of(*[{"batch": 16}] * 500, *[{"batch": 32}] * 500)
    kept = thinned(run, 60)
    assert len(kept) <= 62
    assert {0, 499, 500, 999} <= set(kept)


def reports() -> list[Reported]:
    first = report_on(run_of(*GROWN, name="a </script><b>"), {"seed": 0, "limits.max": 64}, price=10.0)
    second = report_on(with_layers(3), {"seed": 1, "limits.max": 64})
    return [first, second]


def test_the_numbers_are_json_without_nan():
    found = json.loads(json.dumps(numbers(reports()), allow_nan=False))
    assert found["runs"][0]["summary"]["num_examples"] == 288
    assert found["runs"][0]["summary"]["seconds"] is None
    assert found["differences"] == {"seed": [0, 1]}
    assert found["runs"][0]["what_if"][0]["name"] == "as it ran"
    assert found["runs"][1]["reasons"] == {"within hysteresis": 1}


def test_a_name_cannot_leave_the_numbers():
    text = page(reports())
    assert text.count("</script>") == 2
    assert "<b>" not in text


def test_no_runs_no_page():
    with pytest.raises(ValueError, match="at least one run"):
        page([])


def test_a_schedule_goes_by_the_examples_that_it_took_itself():
    run = read_steps([line(step, 64 * step, 64) for step in range(50)], "a")
    # A table of one size is that constant batch.
    constant, table = (what_if(run, Choice.parse(text), price=5.0) for text in ("constant=48", "table=48,48@1000"))
    assert table[1:] == pytest.approx(constant[1:])
    table = what_if(run, Choice.parse("table=16,64@500"))
    # The progress of a step is 64 / 1.64 examples of small batches, at a noise scale of 100: until 500 examples are
    # consumed each costs 1.16 of them, and then 1.64.
    moved = 50 * 64 / 1.64
    small = np.ceil(500 / (1.16 * 64 / 1.64)) * 64 / 1.64
    assert table.examples == pytest.approx(1.16 * small + 1.64 * (moved - small))
    assert table.steps == pytest.approx(small * (1 / 16 + 1 / 100) + (moved - small) * (1 / 64 + 1 / 100))
    assert table.steps_at_equal_examples == pytest.approx(8 * 64 / 16 + 42)
    ramp = what_if(run, Choice.parse("ramp=16,64@2000"))
    assert what_if(run, Choice("constant", 64)).steps < ramp.steps < what_if(run, Choice("constant", 16)).steps


def test_schedules_are_written_as_sizes_and_examples():
    assert Choice.parse("table=16,64@5000,256@2e4").name == "table 16, 64 from 5,000, 256 from 20,000"
    assert Choice.parse("ramp=16,256@20000").name == "ramp 16 to 256 over 20,000"
    wrong = ("table=16", "table=16,64", "ramp=16,64@1,128@2", "table=a,64@10", "table=16,64@20,128@10", "ramp=0,4@9")
    for text in wrong:
        with pytest.raises(ValueError, match=r"written as|ascend|at least 1"):
            Choice.parse(text)


def test_the_list_of_changes_is_cut_for_all_runs_of_a_page_and_says_by_how_many():
    moving = [{"batch": 16 if number % 2 else 32, "reason": "scheduled"} for number in range(401)]
    one, several = (drawn([report_on(run_of(*moving))] * count)["runs"] for count in (1, 2))
    for runs in (one, several):
        assert sum(len(run["changes"]) for run in runs) == MOST_CHANGES
        for run in runs:
            assert len(run["changes"]) + run["changes_left_out"] == run["summary"]["num_changes"] == 400
