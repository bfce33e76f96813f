"""That benchmarks run: their contenders on tiny tasks, which must agree before they are timed."""

from __future__ import annotations

import importlib
import json
import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.hosts import environment_kept

import adabatch
from adabatch import batch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize("task", ["tiny-cnn", "tiny-transformer"])
def test_exact_tests_and_their_rivals_agree(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per-example gradients by torch.func, at once and in chunks, and Opacus where it is installed."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    exact_tests = importlib.import_module("exact_tests")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus uses hooks that torch warns of
        timings = exact_tests.interleave(partial(exact_tests.steps_of, task), trials=1, rounds=2, warmup=0)
        assert exact_tests.peak_of(task, exact_tests.NORMS) > 0
    assert {exact_tests.PLAIN, *exact_tests.GOALS} < timings.seconds.keys()
    assert all(len(seconds) == 2 for seconds in timings.seconds.values())


environment = pytest.fixture(environment_kept)


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("host", ["Accelerate", "Fabric"])  # Lightning's steps are timed in threads, which go on
def test_hosts_alone_and_with_ours_run(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("accelerate", "lightning"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    hosts = importlib.import_module("hosts")
    timings = hosts.measure(host, 4, width=16, depth=1)
    assert {name: len(seconds) for name, seconds in timings.seconds.items()} == {"without": 4, "with": 4}


@pytest.fixture
def frontier(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("frontier")


def test_the_frontier_study_goes_on_where_it_stopped_and_reports(
    frontier: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cell, path = frontier.Cell("digits", "adamw", 512), tmp_path / "runs.jsonl"

    def rows(store: Callable[[Any], Any]) -> list[Any]:
        constants = frontier.constants(cell, store, sizes=(16, 64))
        return [*constants, *frontier.ours(cell, store, chosen=[frontier.DEFAULT])]

    told: list[Any] = []
    found = rows(frontier.Store(path, say=lambda job, outcome: told.append(job)))
    lines = path.read_text().splitlines()
    assert len(told) == len(set(told)) == sum('"outcome"' in line for line in lines)
    assert len(lines) == len(told) + 2, "and the two searches for settings"
    assert all(0 < row.loss < 3 for row in found)
    assert repr(rows(frontier.Store(path, run=False))) == repr(found)

    frontier.report(frontier.Store(path, run=False), [cell], save=False)
    said = capsys.readouterr().out
    assert "digits, adamw, 512: tuned constants" in said
    assert f"Default: {frontier.DEFAULT.name}." in said

    path.write_bytes(path.read_bytes()[:-20])  # as if killed while it wrote the last run
    with pytest.raises(frontier.NotRunError, match="was not run"):
        rows(frontier.Store(path, run=False))
    again: list[Any] = []
    rows(frontier.Store(path, say=lambda job, outcome: again.append(job)))
    assert again == told[-1:]


def test_the_record_of_a_report_stands_for_a_store_that_was_lost(frontier: ModuleType, tmp_path: Path) -> None:
    cell, results = frontier.Cell("digits", "adamw", 512), tmp_path / "frontier.json"
    whole = frontier.Store(tmp_path / "runs.jsonl")
    first = list(frontier.constants(cell, whole, sizes=(64,)))
    reader = frontier.Store(tmp_path / "runs.jsonl", run=False)
    assert repr(list(frontier.constants(cell, reader, sizes=(64,)))) == repr(first)
    assert len(reader.used["runs"]) == len(frontier.SEEDS) < len(whole.outcomes), "tuning left its settings only"
    results.write_text(json.dumps(reader.used))
    restored = frontier.Store(tmp_path / "lost.jsonl", results=results, run=False)
    assert repr(list(frontier.constants(cell, restored, sizes=(64,)))) == repr(first)
    with pytest.raises(frontier.NotRunError, match="was not run"):
        list(frontier.constants(cell, restored, sizes=(16,)))


def test_a_package_that_is_absent_is_a_row_that_says_how_to_get_it(
    frontier: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = importlib.import_module("_frontier.packages")
    monkeypatch.setattr(packages, "INSTALL", dict.fromkeys(packages.INSTALL, ("no_such_package", "pip install it")))
    cell = frontier.Cell("digits", "adamw", 512)
    store = frontier.Store(tmp_path / "runs.jsonl")
    constants = list(frontier.constants(cell, store, sizes=(16,)))
    absent = list(frontier.packages(cell, frontier.Store(tmp_path / "runs.jsonl", run=False)))
    assert [row.name for row in absent] == list(frontier.PACKAGES)
    report = importlib.import_module("_frontier.report")
    page = report.Page("digits", [*constants, *absent], "")
    assert all("pip install it" in line[1] for line in report.methods_table(page).rows)
    assert [row["test"] for row in report.record(page)["rows"][1:]] == [[]] * len(absent)


@pytest.mark.parametrize(("rule", "package"), [("adascale", "fairscale"), ("pollux", "adaptdl")])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.filterwarnings("ignore")
def test_rules_of_packages_train(frontier: ModuleType, rule: str, package: str, optimizer: str) -> None:
    pytest.importorskip(package)
    of = importlib.import_module("_frontier.runs")
    cell = frontier.Cell("digits", optimizer, 512)
    outcome = of.train(cell.job(of.Packaged(rule, 32, 16), frontier.Setting(2**-5, 0.1), 0))
    assert sum(size * count for size, count in outcome.sizes.items()) == 512
    assert 0 < outcome.test < 2.3


def test_a_setting_far_behind_on_the_first_seed_is_not_run_on_the_next(frontier: ModuleType, tmp_path: Path) -> None:
    cell = frontier.Cell("digits", "adamw", 512)
    told: list[tuple[Any, float]] = []
    store = frontier.Store(tmp_path / "runs.jsonl", say=lambda job, outcome: told.append((job, outcome.validation)))
    frontier.tuned_constant(cell, store, 64)
    first, second = ([job for job, _ in told if job.seed == seed] for seed in frontier.CHOICE_SEEDS)
    assert len(second) < len(first)
    best = min(loss for job, loss in told if job.seed == frontier.CHOICE_SEEDS[0])
    assert all(
        any(job.lr == one.lr and job.warmup == one.warmup for job in second) for one, loss in told if loss == best
    )


def test_a_tuned_rate_is_never_at_the_edge_of_its_grid(frontier: ModuleType) -> None:
    asked: list[tuple[float, float]] = []

    def loss(setting: tuple[float, float]) -> float:
        asked.append(setting)
        lr, warmup = setting
        return math.inf if lr > 3 else abs(math.log2(lr / 2)) + abs(warmup - 0.25)

    assert frontier.tune(loss, frontier.Setting(1 / 64, 0.02)) == (2.0, 0.25)
    assert {lr for lr, _ in asked} >= {1.0, 2.0, 4.0}


def test_costs_on_a_frontier_follow_the_power_law_between_its_points(frontier: ModuleType) -> None:
    of = importlib.import_module("_frontier.frontiers")
    points = [of.Point(steps, steps**-0.5) for steps in (16, 64, 1024)]
    curve = of.pareto([*points, of.Point(100, 0.2), of.Point(2000, math.inf)])
    assert curve == points
    assert of.cost_at(curve, 256**-0.5) == of.Cost(pytest.approx(256))
    assert of.loss_at(curve, 256) == pytest.approx(256**-0.5)
    assert of.cost_at(curve, 0.5) == of.Cost(16, "<")
    assert of.cost_at(curve, 0.01) == of.Cost(1024, ">")
    assert of.time_to(points[0], points[1], 128**-0.5) == math.inf
    assert of.time_to(points[0], points[1], 80**-0.5) == pytest.approx(80)


@pytest.mark.parametrize("warmup", [0.1, 0.5])
def test_the_plain_loop_has_the_rates_of_a_schedule(frontier: ModuleType, warmup: float) -> None:
    """So that constants and what follows the noise differ in their batch alone."""
    of = importlib.import_module("_frontier.runs")
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = adabatch.ProgressLR(
        optimizer, adabatch.lr.cosine(), total=adabatch.steps(40), warmup=adabatch.steps(round(40 * warmup))
    )
    for step in range(40):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(of.shape(step / 40, (step + 1) / 40, warmup), abs=1e-12)
        optimizer.step()
        schedule.step()


def test_growth_for_decay_is_by_what_the_schedule_fell(frontier: ModuleType) -> None:
    of = importlib.import_module("_frontier.runs")
    price = adabatch.StepPrice(25.0)
    growing = of.PriceForDecay(price, examples=1000, warmup=0.2)
    moments = batch.GradientMoments.from_noise(100.0, 1.0, part_size=8, num_examples=32)

    def wanted(criterion: Any, num_examples: int) -> float:
        return criterion.wanted(batch.Observation(moments, batch.Progress(examples=num_examples)))

    for num_examples in (0, 100, 600, 900):
        fell = 1.0 if num_examples < 200 else of.shape(num_examples / 1000, num_examples / 1000, 0.2)
        assert wanted(growing, num_examples) == pytest.approx(wanted(price, num_examples) / fell)
    assert wanted(growing, 600) == pytest.approx(100.0), "half of the cosine is half of the rate"
    assert wanted(growing, 1000) == 50.0 * of.LARGEST


def test_each_budget_is_searched_from_the_one_before_it(frontier: ModuleType) -> None:
    cell = frontier.Cell("mnist14", "adamw", 147_456)
    budgets = []
    while cell is not None:
        budgets.append(cell.examples)
        cell = cell.shorter
    assert budgets == [147_456, 49_152, 16_384]


@pytest.mark.parametrize("share", [0.05, 0.15, 0.25])
def test_early_and_late_growth_take_equal_steps(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    claims = importlib.import_module("claims")
    first, later = claims.FIRST, claims.growth(1 / 48, share)
    assert share / first + (1 - share) / later == pytest.approx(1 / 48, rel=0.01)


def test_closed_forms_are_compared_with_simulations_and_with_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    study = importlib.import_module("step_time_model")
    rows = study.compared(rings=(4,), trees=(8,), nodes=(2,))
    assert [row.algorithm for row in rows] == ["ring", "tree", "hierarchy"] * 2
    assert all(row.simulated == pytest.approx(row.closed) for row in rows)
    assert all(row.simulated < min(row.late) for row in rows)
    table, findings = study.simulations(rows)
    assert len(table.rows) == 6
    assert "waits for the slowest" in " ".join(findings)
    # Made-up times of a ring: the fit finds it, and is nothing off between its ends.
    timed = [(size, study.ring_seconds(4, size, latency=1e-4, bandwidth=1e9)) for size in study.GLOO_BYTES]
    found, words = study.rows_of(4, timed)
    assert [row.closed for row in found] == pytest.approx([seconds for _, seconds in timed])
    assert "0.0001 s per message, 1e+09 bytes/s" in words
    table, findings = study.measurements([(found, words)])
    assert len(table.rows) == len(study.GLOO_BYTES)
    assert "0% off in the median and 0% at most" in " ".join(findings)


def test_the_checks_of_a_gpu_hold_on_the_cpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that need no process group or compiler; the command starts each in a process of its own."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    checks = importlib.import_module("gpu_checks")
    cpu = torch.device("cpu")
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        inside = ("loop by hand", "learning rates", "noise", "per-example", "float16", "checkpoints", "memory")
        inside += ("Shampoo", "Shampoo, leading", "bfloat16 products", "K-FAC")
        assert [checks.result_of(name, cpu)[0] for name in inside] == ["passed"] * len(inside)
    finally:
        torch.use_deterministic_algorithms(deterministic)


def test_a_check_of_a_gpu_that_fails_says_how(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    checks = importlib.import_module("gpu_checks")
    monkeypatch.setattr(checks, "off_by", lambda found, right: 0.5)
    status, found = checks.result_of("noise", torch.device("cpu"))
    assert status == "FAILED"
    assert "off by 5.0e-01" in found
    assert "Traceback" in capsys.readouterr().err


def test_the_checks_of_a_gpu_run_by_one_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    checks = importlib.import_module("gpu_checks")
    monkeypatch.setattr("sys.argv", ["gpu_checks.py", "--device", "cpu", "--only", "noise"])
    assert checks.main() == 0
    assert "1 of 1 passed" in capsys.readouterr().out


def test_the_rate_of_adagrad_norm_is_fitted_and_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    rate = importlib.import_module("adagrad_norm_rate")
    steps = rate.np.arange(1, 1001)
    assert rate.exponent(steps, 3.0 * steps**-0.7, first=30) == pytest.approx(-0.7)
    for gradient, value in (
        (rate.slow, lambda x: (rate.SCALES * (1 + x * x) ** (-rate.FLAT / 2)).sum()),
        (rate.wells, lambda x: (rate.SCALES * x * x / (1 + x * x)).sum()),
    ):
        x = torch.linspace(-2, 3, rate.DIM, dtype=torch.float64, requires_grad=True)
        value(x).backward()
        torch.testing.assert_close(gradient(x.detach()), x.grad)
    # the exact batch holds the norm test, the measured one is near it after a while
    runs = [rate.run(rate.slow, make(), 0, num_steps=120, lr=8.0) for make in rate.BATCHES.values()]
    sizes = [rate.np.diff(each.examples) for each in runs]
    assert set(sizes[0]) == {rate.FIRST}
    noise = rate.DIM * rate.NOISE / sizes[1]
    assert (noise <= rate.ETA**2 * runs[1].grad_sq[:-1] * (1 + 1e-9)).all()
    assert 0.3 < sizes[2][-1] / sizes[1][-1] < 2
    found = list(rate.all_rates(num_steps=60, seeds=2))
    assert "comes to a stationary point as O(1/K)" in rate.sentence(found)
