"""``adabatch schedule``: its numbers against slow formulas and published ones, its files against what `train` reads."""

from __future__ import annotations

import json
import lzma
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from adabatch import lr
from adabatch.batch.plan import Duration, Progress
from adabatch.checkpointing.files import begin_checkpoint, checkpoints_in, finish, place_of
from adabatch.checkpointing.run_state import write_state
from adabatch.cli.main import main
from adabatch.cli.schedule.recorded import read_checkpoint, read_run, read_saved
from adabatch.cli.schedule.shape_text import class_path, known_shapes, parse_shape
from adabatch.lr.extend import FinishedRun, extended_schedules
from adabatch.lr.horizon import Horizon, schedule_bound
from adabatch.lr.refine_run import refine_run
from adabatch.lr.rules import gain
from adabatch.lr.shapes import FACTORIES

pytest.importorskip("sklearn", reason="the digits need scikit-learn (extra cli)")

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "lr_cases.json").read_text())["cases"]

CONFIG: dict[str, Any] = {
    "format": 1,
    "model": {"class_path": "adabatch.recipes.models.MLP"},
    "loss": {"class_path": "torch.nn.CrossEntropyLoss"},
    "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}},
    "train_data": {"class_path": "adabatch.recipes.digits.Digits", "init_args": {"split": "train"}},
    "criterion": {"class_path": "adabatch.NormTest", "init_args": {"eta": 0.5}},
    "micro_batch_size": 8,
    "max_micro_batch_size": 64,
    "limits": {"min": 16, "max": 256},
    "lr_rule": "gain",
    "shape": {"class_path": "adabatch.lr.wsd", "init_args": {"cooldown": 0.2}},
    "total": {"count": 3000, "unit": "examples"},
}


class Interrupted(Exception):
    """Stands for whatever ends a run."""


class InterruptedLoss(torch.nn.CrossEntropyLoss):
    """Raises at the given call, and never again in this process."""

    calls_left: int | None = None

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if InterruptedLoss.calls_left is not None:
            InterruptedLoss.calls_left -= 1
            if InterruptedLoss.calls_left < 0:
                InterruptedLoss.calls_left = None
                raise Interrupted
        return super().forward(inputs, targets)


def write_config(folder: Path, **changes: Any) -> str:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, "out": str(folder / "run"), **changes}))
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``config.yaml`` and ``run/``, the digits trained under it."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(["train", "--config", write_config(folder)]) == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of that run to write into."""
    return Path(shutil.copytree(trained / "run", tmp_path / "run"))


def entry(step: int, batch: int, examples: int, **other: Any) -> dict[str, Any]:
    """A line of a journal, as far as schedules read it."""
    return {
        "format": 1,
        "step": step,
        "examples": examples,
        "plan": {"global_batch_size": batch},
        "moments": {"grad_sq": 1.0},
        "norms": {"l2": 1.0, "l1": None},
        "averages": {"noise": 1.0, "signal": 1.0},
        "lr": {"base": [0.1], "shape": [1.0], "factor": 1.0, "applied": [0.1]},
        "applied": True,
        **other,
    }


def journal(path: Path, norms: Any, *, batch: Any = 32, factor: Any = 1.0, which: str = "l2", **other: Any) -> Path:
    """A journal with these norms (None: the step was not probed), batch sizes and batch factors."""
    batches = np.broadcast_to(batch, len(norms))
    factors = np.broadcast_to(factor, len(norms))
    examples = np.concatenate([[0], np.cumsum(batches)])
    with path.open("w") as file:
        for i, norm in enumerate(norms):
            probed = {} if norm is not None else {"moments": None, "norms": None}
            if norm is not None:
                l2 = norm if which == "l2" else 1.0
                probed = {
                    "moments": {"grad_sq": l2**2}, "norms": {"l2": l2, "l1": norm if which == "l1" else None}
                }  # fmt: skip
            rates = {"base": [0.1], "shape": [1.0], "factor": float(factors[i]), "applied": [0.1]}
            line = entry(i, int(batches[i]), int(examples[i]), **{**probed, "lr": rates, **other})
            file.write(json.dumps(line) + "\n")
    return path


def table_of(text: str, first: str) -> list[str]:
    """The cells of the table row that begins with ``first``."""
    (row,) = [line for line in text.splitlines() if line.strip().startswith(first)]
    return re.split(r"\s{2,}", row.strip())


def refined_shape(path: Path) -> lr.Shape:
    return parse_shape(str(path)).shape


# --- shapes as text ---------------------------------------------------------------------------------------------------

EXAMPLES = [
    lr.constant(),
    lr.linear(floor=0.1),
    lr.cosine(),
    lr.wsd(cooldown=0.2, decay="1-sqrt", floor=0.05),
    lr.inverse_sqrt(timescale=0.01, cooldown=0.1),
    lr.polynomial(power=2),
    lr.piecewise(milestones=[0.3, 0.6], factors=[0.1, 0.5]),
    lr.hyperbolic(upper_bound=2.5, infimum=1e-4),
    lr.exp_hyperbolic(upper_bound=2.5, infimum=1e-4),
    lr.tabulated(values=[0.0, 1.0, 0.5]),
]


@pytest.mark.parametrize("shape", EXAMPLES, ids=lambda shape: shape.name)
def test_every_shape_reads_back_from_its_own_text_and_from_a_config(shape: lr.Shape, tmp_path: Path) -> None:
    assert parse_shape(repr(shape)).shape == shape
    path = tmp_path / "shape.yaml"
    path.write_text(yaml.safe_dump({"shape": class_path(shape), "total": {"count": 3}}))
    assert parse_shape(str(path)) == ("shape.yaml", shape)


def test_all_shapes_are_known() -> None:
    assert {shape.name for shape in EXAMPLES} == set(FACTORIES)
    with pytest.raises(ValueError, match="there is no shape 'x': use one of") as caught:
        lr.Shape("x", {})
    assert f"use one of {', '.join(FACTORIES)}" in str(caught.value)
    assert "wsd(cooldown, decay, floor)" in known_shapes()


@pytest.mark.parametrize(
    "text, words",
    [
        ("", ["not a shape"]),
        ("linaer", ["linaer", "linear"]),
        ("wsd", ["wsd", "cooldown"]),
        ("wsd(0.2)", ["not a shape", "keyword"]),
        ("wsd(cooldown=1.2)", ["cooldown", "1.2"]),
        ("wsd(cooldown=0.2, cooldown=0.3)", ["not a shape"]),
        ("wsd(cooldown=0.2, colour=1)", ["colour", "decay"]),
        ("wsd(**{'cooldown': 0.2})", ["not a shape"]),
        ("wsd(cooldown=open('x'))", ["number", "open('x')"]),
        ("wsd(cooldown=1/5)", ["number", "1 / 5"]),
        ("lr.wsd(cooldown=0.2)", ["not a shape"]),
        ("linear; cosine", ["not a shape"]),
        ("wsd(cooldown=", ["not a shape"]),
        ("linear\0", ["not a shape"]),
        ("(" * 1000, ["not a shape"]),
        ("no/such.yaml", ["no/such.yaml"]),
    ],
)
def test_a_text_that_is_no_shape_says_what_one_is(text: str, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        parse_shape(text)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "content", ["{", "shape: 3", "total: 3", "shape: {class_path: os.system}", "shape: {class_path: adabatch.lr.wsd}"]
)
def test_a_file_without_a_shape_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(ValueError):
        parse_shape(str(tmp_path / "x.yaml"))


# --- compare ----------------------------------------------------------------------------------------------------------


def triple_sum(eta: Any, norms: Any, base_lr: float) -> float:
    """The bound as Theorem 10 prints it, O(T^3): nothing telescoped."""
    eta = [base_lr * float(value) for value in eta]
    squares = [float(norm) ** 2 for norm in norms]
    total, steps = sum(eta), range(len(eta))
    last = sum(
        eta[k] / sum(eta[k + 1 :]) * sum(eta[t] ** 2 * squares[t] for t in range(k, len(eta))) / sum(eta[k:])
        for k in steps[:-1]
    )
    return 1 / (2 * total) + sum(eta[t] ** 2 * squares[t] for t in steps) / (2 * total) + last / 2


@pytest.mark.parametrize("case, shape", [("S01", "wsd(cooldown=0.2)"), ("S03", "linear")])
def test_the_table_holds_the_published_numbers(case: str, shape: str, tmp_path: Path, capsys: Any) -> None:
    assert main(["schedule", "compare", "--shapes", shape, "--steps=400", f"--out={tmp_path / 'x.png'}"]) == 0
    cells = table_of(capsys.readouterr().out, shape.split("(")[0])
    expected = GOLDEN[case]["expected"]
    # five digits are printed
    assert float(cells[2]) == pytest.approx(expected["exact_gamma_star"], rel=5e-5)
    assert float(cells[4]) == pytest.approx(expected["exact_omega_star"], rel=5e-5)


def test_compare_ranks_and_cites(tmp_path: Path, capsys: Any) -> None:
    shapes = ["linear", "cosine", "wsd(cooldown=0.2, decay='1-sqrt')", "piecewise(milestones=[0.5], factors=[0.1])"]
    out = tmp_path / "new" / "shapes.png"
    assert main(["schedule", "compare", "--shapes", *shapes, "--warmup_steps=100", f"--out={out}"]) == 0
    text = capsys.readouterr().out
    for shape in shapes:
        cells = table_of(text, shape)
        factors = lr.discretize(parse_shape(shape).shape, 1000, warmup_steps=100)
        terms = lr.bound_terms(factors)
        linear = lr.bound_terms(lr.discretize(lr.linear(), 1000, warmup_steps=100))
        expected = [factors.mean(), terms.best_base_lr, terms.best_base_lr / linear.best_base_lr, terms.best]
        assert [float(cell) for cell in cells[1:5]] == pytest.approx(expected, rel=1e-3)
        assert float(cells[5]) == pytest.approx(terms.best / linear.best, rel=1e-3)
    assert "arXiv:2310.07831, Theorem 10" in text
    assert "arXiv:2501.18965" in text
    assert out.read_bytes().startswith(b"\x89PNG")


@given(
    num_steps=st.integers(2, 300),
    warmup=st.floats(0, 0.99),
    shape=st.sampled_from([shape for shape in EXAMPLES if shape.name != "tabulated"]),
)
def test_equal_steps_are_what_the_library_evaluates(num_steps: int, warmup: float, shape: lr.Shape) -> None:
    warmup_steps = int(warmup * num_steps)
    expected = lr.discretize(shape, num_steps, warmup_steps=warmup_steps)
    horizon = Horizon.of_equal_steps(num_steps)
    np.testing.assert_allclose(horizon.factors(shape, warmup_steps=warmup_steps), expected, rtol=1e-15)
    # resampled, the progress has rounding errors, which a jump or an infinite slope makes visible
    if shape.name not in ("piecewise", "wsd"):
        again = Horizon.of_equal_steps(7).resampled(num_steps)
        np.testing.assert_allclose(again.factors(shape, warmup_steps=warmup_steps), expected, rtol=0, atol=1e-7)


def test_the_norms_of_a_run_come_with_its_batch_factors_and_its_progress(
    run: Path, tmp_path: Path, capsys: Any
) -> None:
    out = f"--out={tmp_path / 'x.png'}"
    assert main(["schedule", "compare", "--shapes", "cosine", "linear", f"--norms={run}", out]) == 0
    text = capsys.readouterr().out
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines() if '"plan"' in line]
    batches = np.array([line["plan"]["global_batch_size"] for line in lines])
    assert batches.max() > 2 * batches.min()
    done = np.array([line["examples"] for line in lines])
    progress = done / batches.sum()
    norms = [math.sqrt(line["moments"]["grad_sq"]) for line in lines]
    assert f"{len(lines)} steps" in text
    for name in ("cosine", "linear"):
        eta = getattr(lr, name)()(progress) * [line["lr"]["factor"] for line in lines]
        cells = table_of(text, name)
        best, least = float(cells[2]), float(cells[4])
        assert triple_sum(eta, norms, best) == pytest.approx(least, rel=1e-4)
        # at the minimum, so flat: a tenth off costs half a percent
        assert triple_sum(eta, norms, 1.1 * best) == pytest.approx(least * (1 + 0.01 / 2.2), rel=1e-4)


@pytest.mark.skipif("ADABATCH_DATA" not in os.environ, reason="ADABATCH_DATA names no folder with llm_logs/")
def test_the_norms_of_a_real_run_give_the_ranking_that_was_worked_out_for_it(tmp_path: Path, capsys: Any) -> None:
    """The 124M cosine run of D17; the ratios to linear are those of a separate evaluation, to a tenth of a percent."""
    logs = Path(os.environ["ADABATCH_DATA"]) / "llm_logs" / "grad_norm_runs.json.xz"
    with lzma.open(logs) as file:
        runs = {Path(one["file"]).name: one["history"]["train"] for one in json.load(file)}
    norms = runs[GOLDEN["D17"]["inputs"]["file"]]["grad_norm"]
    source = journal(tmp_path / "journal.jsonl", norms)
    for kind in ("sgd", "adam"):
        path = journal(tmp_path / f"{kind}.jsonl", norms, which="l1" if kind == "adam" else "l2")
        arguments = ["refine", str(path), f"--kind={kind}", "--length=1000", f"--out={tmp_path / kind}"]
        assert main(["schedule", *arguments]) == 0
        expected = lr.refine(norms, kind)
        got = refined_shape(tmp_path / kind / "refined.yaml")
        progress = np.linspace(0, 1, 1000)
        np.testing.assert_allclose(got(progress), expected(progress), rtol=1e-5, atol=1e-9)
    (tmp_path / "sgd.yaml").write_text((tmp_path / "sgd" / "refined.yaml").read_text())
    (tmp_path / "adam.yaml").write_text((tmp_path / "adam" / "refined.yaml").read_text())
    capsys.readouterr()
    shapes = ["linear", "cosine", "wsd(cooldown=0.2)", str(tmp_path / "sgd.yaml"), str(tmp_path / "adam.yaml")]
    assert main(["schedule", "compare", "--shapes", *shapes, f"--norms={source}", f"--out={tmp_path / 'x.png'}"]) == 0
    text = capsys.readouterr().out
    linear = float(table_of(text, "linear")[4])
    for name, percent in {"wsd": 18.7, "cosine": -3.6, "sgd.yaml": -10.0, "adam.yaml": -8.2}.items():
        assert 100 * (float(table_of(text, name)[4]) / linear - 1) == pytest.approx(percent, abs=0.1)


# --- refine -----------------------------------------------------------------------------------------------------------


def slow_refinement(weights: Any, factors: Any) -> Any:
    """``w_t / f_t * sum_{p>t} w_p`` in the plainest words."""
    values = [weights[t] / factors[t] * sum(weights[t + 1 :]) for t in range(len(weights))]
    return np.array(values) / max(values)


# each example writes a journal
FEWER = settings(max_examples=40)
NORMS = st.lists(st.floats(0.2, 5.0), min_size=2, max_size=40)


@FEWER
@given(norms=NORMS, kind=st.sampled_from(["sgd", "adam", "adagrad"]), smoothing=st.sampled_from([0.0, 0.1, 0.5]))
def test_at_a_constant_batch_it_is_the_refinement_of_the_library(
    tmp_path_factory: pytest.TempPathFactory, norms: list[float], kind: Any, smoothing: float
) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    recorded = read_run(journal(path, norms, which="l2" if kind == "sgd" else "l1"))
    made = refine_run(
        recorded, kind, factor=recorded.factor, edges=recorded.edges("examples", 32), smoothing=smoothing, length=200
    )
    expected = lr.refine(norms, kind, smoothing=smoothing).settings["values"]
    np.testing.assert_allclose(made.shape.settings["values"], expected, rtol=1e-5, atol=1e-12)  # six digits are kept


@FEWER
@given(data=st.data(), kind=st.sampled_from(["sgd", "adam"]), norms=NORMS)
def test_shape_times_batch_factor_is_the_refined_schedule_whatever_the_rule(
    tmp_path_factory: pytest.TempPathFactory, data: Any, kind: Any, norms: list[float]
) -> None:
    size = len(norms)
    batch = data.draw(st.lists(st.sampled_from([16, 32, 64, 256]), min_size=size, max_size=size))
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    recorded = read_run(
        journal(
            path,
            norms,
            batch=batch,
            which="l2" if kind == "sgd" else "l1",
            averages={"noise": 100.0, "signal": 2.0},
        )
    )
    weights = np.array(norms) ** (-2.0 if kind == "sgd" else -1.0)
    for rule in ("none", "linear", "sqrt", "gain", "sqrt_gain"):
        factor = recorded.factors(rule, 16)  # type: ignore[arg-type]
        edges = recorded.edges("examples", 16)
        made = refine_run(recorded, kind, factor=factor, edges=edges, smoothing=0, length=200)
        expected = slow_refinement(weights, factor)
        np.testing.assert_allclose(made.values, expected, rtol=1e-9, atol=1e-12)
        assert made.progress[0] == 0
        assert made.progress[-1] == 1
        np.testing.assert_allclose(made.progress, np.cumsum([0, *batch[:-1]]) / sum(batch[:-1]), rtol=1e-12)


def test_under_the_gain_rule_and_the_gain_clock_flat_noise_asks_for_linear_decay(tmp_path: Path) -> None:
    """AdaScale's own bookkeeping: gain scaling times linear decay in gain-steps, for any batch sizes."""
    generator = np.random.default_rng(0)
    batch = generator.choice([16, 32, 128, 1024], size=400)
    noise, signal = 300.0, 2.0
    norms = np.sqrt(signal + noise / batch)
    recorded = read_run(
        journal(tmp_path / "j.jsonl", norms.tolist(), batch=batch, averages={"noise": noise, "signal": signal})
    )
    factor = recorded.factors("gain", 16)
    assert factor[0] == pytest.approx(gain(batch[0] / 16, 16, noise=noise, signal=signal))
    edges = recorded.edges("gain_steps", 16)
    made = refine_run(recorded, "sgd", factor=factor, edges=edges, smoothing=0, length=200)
    # exact but for where the last step lies, one in four hundred
    progress = np.linspace(0, 1, 50)
    np.testing.assert_allclose(made.shape(progress), 1 - progress, atol=0.006)
    # and the examples clock is another one
    other = refine_run(recorded, "sgd", factor=factor, edges=recorded.edges("examples", 16), smoothing=0, length=200)
    assert np.abs(other.shape(progress) - (1 - progress)).max() > 0.01


def test_steps_between_measured_ones_are_interpolated_and_skipped_updates_left_out(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal(path, [2.0, None, 4.0, None, None, None, 1.0])
    lines = path.read_text().splitlines()
    lines[3] = json.dumps(entry(3, 32, 96, applied=False, lr=None, moments={"grad_sq": None}, norms={"l2": None}))
    path.write_text("\n".join(lines) + "\n")
    recorded = read_run(path)
    measured = recorded.norms("l2")
    assert measured.at.tolist() == [0, 2, 5]
    assert measured.for_each(recorded.num_steps).tolist() == [2, 3, 4, 3, 2, 1]
    assert recorded.batch.tolist() == [32] * 6


def test_an_unfinished_last_line_is_left_out(tmp_path: Path) -> None:
    path = journal(tmp_path / "journal.jsonl", [2.0, 3.0, 4.0])
    path.write_text(path.read_text()[:-30])
    assert read_run(path).num_steps == 2


def test_journals_from_before_the_norms_have_their_squares(tmp_path: Path) -> None:
    line = {key: value for key, value in entry(0, 8, 0).items() if key != "norms"}
    text = "".join(
        json.dumps({**line, "examples": 8 * number, "moments": {"grad_sq": square}}) + "\n"
        for number, square in enumerate((4.0, 9.0))
    )
    (tmp_path / "journal.jsonl").write_text(text)
    assert read_run(tmp_path).norms("l2").norms.tolist() == [2, 3]


def test_the_refined_config_trains_and_its_schedule_is_what_is_applied(
    trained: Path, run: Path, tmp_path: Path, capsys: Any
) -> None:
    """One flag more than the run before; the warm-up and the settings of the old shape are gone."""
    assert main(["schedule", "refine", str(run), "--smoothing=0.2"]) == 0
    text = capsys.readouterr().out
    for words in ("Algorithm 1", "arXiv:2310.07831", "peak at", "mean", "refined.png", "same lr_rule", "batch factors"):
        assert words in text
    assert (run / "refined.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "again").mkdir()
    warm = write_config(tmp_path / "again", warmup={"count": 200, "unit": "examples"})
    assert main(["train", "--config", warm, "--config", str(run / "refined.yaml")]) == 0
    state = saved_state(tmp_path / "again" / "run")["schedule"]
    shape = refined_shape(run / "refined.yaml")
    assert lr.Shape.from_dict(state["shape"]) == shape
    assert state["warmup"] is None
    for line in (tmp_path / "again" / "run" / "journal.jsonl").read_text().splitlines():
        written = json.loads(line)
        assert written["lr"]["shape"] == [pytest.approx(shape(min(1.0, written["examples"] / 3000)), rel=1e-12)]


def test_another_rule_and_clock_for_the_next_run_are_written_with_the_reference(run: Path, capsys: Any) -> None:
    assert main(["schedule", "refine", str(run), "--lr_rule=none", "--length=50", "--clock=gain_steps"]) == 0
    config = yaml.safe_load((run / "refined.yaml").read_text())
    assert config["lr_rule"] == "none"
    assert config["clock"] == "gain"
    assert config["reference_batch_size"] == 16
    assert len(config["shape"]["init_args"]["values"]) == 50
    assert "lr_rule none" in capsys.readouterr().out


def test_a_batch_that_grew_without_a_factor_is_inside_the_shape(tmp_path: Path, capsys: Any) -> None:
    path = journal(tmp_path / "journal.jsonl", [1.0] * 8 + [0.5] * 8, batch=[16] * 8 + [64] * 8)
    assert main(["schedule", "refine", str(path)]) == 0
    assert "must be none" in capsys.readouterr().out


def test_a_peak_at_the_end_is_called_suspicious(tmp_path: Path, capsys: Any) -> None:
    path = journal(tmp_path / "journal.jsonl", [3.0] * 30 + [0.1] * 10)
    assert main(["schedule", "refine", str(path)]) == 0
    assert "the peak comes at 7" in capsys.readouterr().out


def test_the_suggested_base_lr_is_the_ratio_of_the_bounds(run: Path, capsys: Any) -> None:
    assert main(["schedule", "refine", str(run)]) == 0
    row = table_of(capsys.readouterr().out, "refined ")
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines() if '"plan"' in line]
    norms = [math.sqrt(line["moments"]["grad_sq"]) for line in lines]
    factor = np.array([line["lr"]["factor"] for line in lines])
    total = sum(line["plan"]["global_batch_size"] for line in lines)
    own = lr.best_base_lr(factor * [line["lr"]["shape"][0] for line in lines], norms)
    shape = refined_shape(run / "refined.yaml")
    new = lr.best_base_lr(factor * [shape(line["examples"] / total) for line in lines], norms)
    assert float(row[1]) == pytest.approx(new / own, rel=1e-3)
    assert float(row[2]) == pytest.approx(0.1 * new / own, rel=1e-3)
    assert f"suggests {row[2]}" in (run / "refined.yaml").read_text()


# --- transfer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lengths",
    [
        {},
        {"steps": 400, "target_steps": 1600},
        {"steps": 400, "warmup_steps": 40},
        {"steps": 400, "warmup_steps": 40, "target_steps": 800, "target_warmup_steps": 0},
    ],
)
def test_transfer_is_that_of_the_library(lengths: dict[str, int], tmp_path: Path, capsys: Any) -> None:
    flags = [f"--{name}={value}" for name, value in lengths.items()]
    shapes = ["--source", "wsd(cooldown=0.2)", "--target", "cosine(floor=0.1)"]
    out = tmp_path / "transfer.png"
    assert main(["schedule", "transfer", "--base_lr=2e-3", *shapes, *flags, f"--out={out}"]) == 0
    text = capsys.readouterr().out
    expected = lr.transfer(
        2e-3,
        lr.wsd(cooldown=0.2),
        lr.cosine(floor=0.1),
        num_steps=lengths.pop("steps", 1000),
        **lengths,  # type: ignore[arg-type]
    )
    assert float(table_of(text, "new:")[-1]) == pytest.approx(expected, rel=5e-4)
    assert float(table_of(text, "new:")[-2]) == pytest.approx(expected / 2e-3, abs=5e-5)
    assert "closed form" not in text
    assert out.read_bytes().startswith(b"\x89PNG")


def test_linear_cooldowns_have_their_closed_form_beside_it(tmp_path: Path, capsys: Any) -> None:
    shapes = ["--source", "wsd(cooldown=0.2)", "--target", "linear", "--steps=20000", "--target_steps=40000"]
    assert main(["schedule", "transfer", "--base_lr=1", *shapes, f"--out={tmp_path / 'x.png'}"]) == 0
    text = capsys.readouterr().out
    closed = re.search(r"closed form .* factor ([\d.]+), base LR ([\d.]+)", text)
    assert closed is not None
    ratio = math.sqrt(1.8 * (2 + math.log(9)) / 2) / math.sqrt(2)
    assert float(closed[1]) == pytest.approx(ratio, abs=5e-5)
    # the limit of long runs: within a tenth of a percent at 20,000 steps
    assert float(table_of(text, "new:")[-1]) == pytest.approx(ratio, rel=1e-3)


def test_transfer_reads_the_norms_of_a_run(tmp_path: Path, capsys: Any) -> None:
    norms = np.linspace(2, 0.5, 60)
    path = journal(tmp_path / "journal.jsonl", norms.tolist())
    shapes = ["--source", "wsd(cooldown=0.2)", "--target", "linear", f"--norms={path}", "--target_steps=120"]
    assert main(["schedule", "transfer", "--base_lr=1", *shapes, f"--out={tmp_path / 'x.png'}"]) == 0
    expected = lr.transfer(1, lr.wsd(cooldown=0.2), lr.linear(), num_steps=60, target_steps=120, norms=norms)
    assert float(table_of(capsys.readouterr().out, "new:")[-1]) == pytest.approx(expected, rel=5e-4)


# --- extend -----------------------------------------------------------------------------------------------------------


@FEWER
@given(
    num_steps=st.integers(100, 1000),
    warmup=st.floats(0, 0.2),
    cooldown=st.floats(0.05, 0.8),
    factor=st.floats(1.1, 8.0),
    decay=st.sampled_from(["linear", "1-sqrt"]),
)
def test_the_options_are_schedules_of_the_whole_run(
    num_steps: int, warmup: float, cooldown: float, factor: float, decay: Any
) -> None:
    """Equal to the finished run's up to where they part from it, and with the base LR that the bound calls the best."""
    warmup_steps = int(warmup * num_steps)
    total = Duration(round(num_steps * factor), "steps")
    finished = FinishedRun(num_steps, warmup_steps, float(warmup_steps), cooldown, decay, Duration(num_steps, "steps"))
    options = extended_schedules(finished, total)
    old = lr.discretize(lr.wsd(cooldown=cooldown, decay=decay), num_steps, warmup_steps=warmup_steps)
    horizon = Horizon.of_equal_steps(total.count)
    for label, option in options.items():
        judged = schedule_bound(option.shape, horizon, warmup_steps=warmup_steps)
        same = min(math.floor(option.resume + 1e-6), num_steps) + 1
        np.testing.assert_allclose(judged.factors[:same], old[:same], rtol=1e-12, atol=0)
        ratio = judged.terms.best_base_lr / lr.best_base_lr(old)
        if label == "two stages" or (label == "longer cooldown" and option.cooldown < 1):
            # the table has four entries for the ramp, and less than a percent of the run to each
            assert ratio == pytest.approx(1, abs=0.02)
        elif label == "unchanged":
            assert ratio < 1
    stages = lr.two_stage(num_steps, total.count, cooldown=cooldown, decay=decay, warmup_steps=warmup_steps)
    assert options["two stages"].lr_factor == pytest.approx(stages.lr_factor, rel=0.05)  # that one falls at once
    longer = lr.longer_cooldown(num_steps, total.count, cooldown=cooldown, decay=decay, warmup_steps=warmup_steps)
    assert options["longer cooldown"].cooldown == longer.cooldown
    assert abs(options["longer cooldown"].resume - longer.resume_step) <= 1


def test_extend_shows_both_options_in_the_unit_of_the_total_and_in_steps(run: Path, capsys: Any) -> None:
    assert main(["schedule", "extend", str(run)]) == 0
    text = capsys.readouterr().out
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines() if '"plan"' in line]
    saved = read_saved(run)
    assert saved is not None
    assert saved.total == Duration(3000, "examples")
    assert saved.progress == Progress(**saved_state(run)["batches"]["progress"])
    for label in ("two stages", "longer cooldown"):
        cells = table_of(text, label)
        place, steps = int(cells[3].replace(",", "")), int(cells[4])
        # after so many steps the run had not passed the place, after one more it had
        assert lines[steps]["examples"] <= place < lines[steps]["examples"] + lines[steps]["plan"]["global_batch_size"]
        assert float(cells[5]) == pytest.approx(1, abs=0.02)
        assert float(cells[6]) < 1
        config = yaml.safe_load((run / f"extend_{label.replace(' ', '_')}.yaml").read_text())
        assert config["total"] == {"count": 6000, "unit": "examples"}
    assert int(table_of(text, "two stages")[3].replace(",", "")) == 2400
    assert "too late for two stages and longer cooldown" in text
    assert "arXiv:2501.18965" in text
    assert (run / "extend.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("trained")
def test_a_checkpoint_goes_on_under_either_extension_as_if_it_had_been_so_from_the_start(
    tmp_path: Path, capsys: Any
) -> None:
    config = write_config(
        tmp_path,
        loss={"class_path": f"{__name__}.InterruptedLoss"},
        checkpoint={"every": {"count": 100, "unit": "examples"}},
        max_micro_batch_size=None,
        limits={"min": 16, "max": 64},
        total={"count": 1000, "unit": "examples"},
    )
    InterruptedLoss.calls_left = 70
    with pytest.raises(Interrupted):
        main(["train", "--config", config])
    run = tmp_path / "run"
    done = read_checkpoint(newest(run)).progress.examples
    assert 300 < done < 700
    assert main(["schedule", "extend", str(run), "--new_total=2000", f"--checkpoint={newest(run)}"]) == 0
    assert "before both options depart" in capsys.readouterr().out
    for name in ("extend_two_stages", "extend_longer_cooldown"):
        snippet = ["--config", config, "--config", str(run / f"{name}.yaml")]
        assert main(["train", *snippet, f"--out={run / name}"]) == 0
        assert main(["train", *snippet, f"--out={tmp_path / name}"]) == 0
        resumed, whole = (saved_state(folder / name) for folder in (run, tmp_path))
        assert resumed["batches"] == whole["batches"]
        assert resumed["batches"]["consumed"]["examples"] >= 2000
        for key, value in whole["model"].items():
            assert torch.equal(resumed["model"][key], value)


# --- mistakes ---------------------------------------------------------------------------------------------------------


def newest(run: Path) -> Path:
    return next(iter(checkpoints_in(run / "checkpoints").values()))


def saved_state(run: Path) -> dict[str, Any]:
    """What the newest checkpoint of a run holds."""
    state: dict[str, Any] = torch.load(newest(run) / "state.pt", weights_only=True)
    return state


def save_again(run: Path, state: dict[str, Any]) -> Path:
    """A newer checkpoint with this state."""
    folder = run / "checkpoints"
    place = place_of(folder, begin_checkpoint(folder, 9), 9)
    return finish(place, {}, write_state(state, place), keep=9)


def fails(arguments: list[str], words: list[str], capsys: Any) -> None:
    assert main(["schedule", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("adabatch schedule: error: ")
    assert len(error.splitlines()) == 1
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["compare", "--shapes", "linaer"], ["linaer", "linear, cosine, wsd"]),
        (["compare", "--shapes", "wsd(cooldown=2)"], ["cooldown", "[0, 1]", "2"]),
        (["compare", "--steps=0"], ["at least 1 step", "0"]),
        (["compare", "--steps=100", "--warmup_steps=100"], ["warmup_steps", "[0, 99]", "100", "shorten"]),
        (["compare", "--warmup_steps=-1"], ["warmup_steps", "-1"]),
        (["compare", "--clock=steps"], ["clock", "--norms"]),
        (["compare", "--norms=/no/such/run"], ["/no/such/run", "no journal", "adabatch train"]),
        (["refine", "/no/such/run"], ["/no/such/run", "no journal"]),
        (["extend", "/no/such/run"], ["/no/such/run", "checkpoints"]),
        (["transfer", "--base_lr=0", "--source=linear", "--target=cosine"], ["base_lr", "positive", "0"]),
        (["transfer", "--base_lr=.nan", "--source=linear", "--target=cosine"], ["base_lr", "nan"]),
        (["transfer", "--base_lr=1", "--source=linear", "--target=cosin"], ["cosin"]),
        (["transfer", "--base_lr=1", "--source=linear", "--target=cosine", "--target_steps=0"], ["1 step"]),
        (
            ["transfer", "--base_lr=1", "--source=linear", "--target=cosine", "--warmup_steps=50", "--target_steps=20"],
            ["warmup_steps", "[0, 19]"],
        ),
    ],
)
def test_mistakes_end_in_one_clear_line(
    arguments: list[str], words: list[str], capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fails(arguments, words, capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "norms, words",
    [
        ([1.0, 0.0, 2.0], ["line 2", "0", "positive"]),
        ([1.0, 2.0, math.nan], ["line 3", "inf", "positive, finite"]),
        ([1.0], ["one l2 norm", "two"]),
        ([None, None, 3.0], ["one l2 norm", "two"]),
        ([None, None], ["no l2 norms", "--measure.monitor=true"]),
        ([], ["no applied step"]),
    ],
)
@pytest.mark.parametrize("command", ["refine", "compare"])
def test_norms_that_cannot_be_used_say_why(
    norms: Any, words: list[str], command: str, tmp_path: Path, capsys: Any
) -> None:
    path = journal(tmp_path / "journal.jsonl", norms)
    if any(norm is not None and math.isnan(norm) for norm in norms):
        path.write_text(path.read_text().replace("NaN", "null"))  # as the journal writes what is not finite
    arguments = ["refine", str(path)] if command == "refine" else ["compare", "--norms", str(tmp_path)]
    fails(arguments, words, capsys)
    assert not (tmp_path / "refined.yaml").exists()


def test_adam_needs_l1_norms_and_says_how_they_are_recorded(tmp_path: Path, capsys: Any) -> None:
    path = journal(tmp_path / "journal.jsonl", [1.0, 2.0, 3.0])
    fails(["refine", str(path), "--kind=adam"], ["no l1 norms", "measure.l1=true"], capsys)


def test_a_rule_that_reads_the_noise_needs_it_in_the_journal(tmp_path: Path, capsys: Any) -> None:
    path = journal(tmp_path / "journal.jsonl", [1.0, 2.0, 3.0], averages=None)
    fails(["refine", str(path), "--lr_rule=gain"], ["noise", "'gain'"], capsys)


@pytest.mark.parametrize("flag, words", [("--smoothing=1.5", ["smoothing", "1.5"]), ("--length=1", ["length", "1"])])
def test_settings_of_refine_out_of_their_range(flag: str, words: list[str], tmp_path: Path, capsys: Any) -> None:
    fails(["refine", str(journal(tmp_path / "journal.jsonl", [1.0, 2.0])), flag], words, capsys)


@pytest.mark.parametrize(
    "text, words",
    [
        ("{\n{}\n", ["line 1", "not JSON"]),
        ("[1]\n", ["line 1"]),
        ('{"format": 7}\n', ["line 1", "format 7"]),
        ('{"format": 1, "loss": 3}\n', ["line 1", "plan"]),
        (json.dumps(entry(0, 8, 0, lr={"factor": 0})) + "\n", ["line 1", "batch factor"]),
    ],
)
def test_a_file_that_is_no_journal_is_refused(text: str, words: list[str], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "journal.jsonl").write_text(text)
    fails(["refine", str(tmp_path)], words, capsys)


@pytest.mark.parametrize(
    "schedule, words",
    [
        ({"shape": lr.cosine().to_dict()}, ["cosine()", "wsd", "transfer"]),
        ({"shape": lr.wsd(cooldown=0.2, floor=0.1).to_dict()}, ["floor=0.1"]),
        ({"shape": lr.wsd(cooldown=0.0).to_dict()}, ["cooldown=0.0"]),
        ({"anchor": None}, ["warming up"]),
        ({"anchor": [100, 0.5, 0.0]}, ["total was changed"]),
        ({"clock": "gain"}, ["gain clock"]),
        ({"total": [3, "parsecs"]}, ["not a checkpoint of `adabatch train`", "parsecs"]),
    ],
)
def test_runs_that_cannot_be_extended_say_why(
    schedule: dict[str, Any], words: list[str], run: Path, capsys: Any
) -> None:
    state = saved_state(run)
    state["schedule"] |= schedule
    save_again(run, state)
    fails(["extend", str(run)], words, capsys)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--factor=1"], ["factor", "above 1"]),
        (["--factor=.inf"], ["factor", "inf"]),
        (["--factor=2", "--new_total=5000"], ["not both"]),
        (["--new_total=3000"], ["longer than 3,000 examples"]),
        (["--checkpoint=/no/such"], ["/no/such"]),
    ],
)
def test_lengths_and_checkpoints_that_do_not_fit(flags: list[str], words: list[str], run: Path, capsys: Any) -> None:
    fails(["extend", str(run), *flags], words, capsys)


def test_a_checkpoint_too_late_or_of_another_run_is_refused(run: Path, tmp_path: Path, capsys: Any) -> None:
    late = newest(run)
    fails(["extend", str(run), f"--checkpoint={late}"], ["2,400 examples", "or before"], capsys)
    state = saved_state(run)
    state["schedule"]["base_lrs"] = [7.0]
    other = save_again(tmp_path / "other", state)
    fails(["extend", str(run), f"--checkpoint={other}"], ["another run", "7.0"], capsys)


def test_a_checkpoint_of_something_else_is_named(run: Path, capsys: Any) -> None:
    save_again(run, {"model": {}})
    for command in ("extend", "refine"):
        fails([command, str(run)], ["-step-", "not a checkpoint of `adabatch train`"], capsys)
    assert main(["schedule", "refine", str(run / "journal.jsonl")]) == 0  # the journal alone does


@pytest.mark.parametrize("content", [b"", b"nonsense"])
def test_damaged_checkpoints_are_named(content: bytes, run: Path, capsys: Any) -> None:
    for path in checkpoints_in(run / "checkpoints").values():
        (path / "state.pt").write_bytes(content)
    for command in ("extend", "refine"):
        assert main(["schedule", command, str(run)]) == 1
        error = capsys.readouterr().err
        assert "-step-" in error
        assert "state.pt has" in error


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "taken").write_text("")
    fails(["compare", f"--out={tmp_path / 'taken' / 'x.png'}"], ["taken"], capsys)


@pytest.mark.parametrize("command", ["compare", "refine", "transfer", "extend"])
def test_help_shows_what_there_is(command: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as done:
        main(["schedule", command, "--help"])
    assert done.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Example: adabatch schedule" in text
    if command in ("compare", "transfer"):
        assert "wsd(cooldown, decay, floor)" in text
