"""``adabatch cbs``: branches from a checkpoint of a job, with their table, numbers and picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adabatch.cli import cbs
from adabatch.cli.main import main

pytest.importorskip("sklearn", reason="the digits need scikit-learn (extra cli)")

CONFIG: dict[str, Any] = {
    "format": 1,
    "model": {"class_path": "adabatch.recipes.models.MLP"},
    "loss": {"class_path": "torch.nn.CrossEntropyLoss"},
    "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05}},
    "train_data": {"class_path": "adabatch.recipes.digits.Digits", "init_args": {"split": "train"}},
    "test_data": {"class_path": "adabatch.recipes.digits.Digits", "init_args": {"split": "test"}},
    "criterion": {"class_path": "adabatch.NormTest", "init_args": {"eta": 0.7}},
    "micro_batch_size": 8,
    "limits": {"min": 16, "max": 64},
    "lr_rule": "sqrt",
    "total": {"count": 2000, "unit": "examples"},
    "shape": {"class_path": "adabatch.lr.linear"},
    "checkpoint": {"every": {"count": 500, "unit": "examples"}, "keep": 9},
}
BRANCHES = ["--smallest=16", "--factors", "1", "4", "16", "--examples=1024"]


@pytest.fixture
def trained(config: Any, tmp_path: Path, capsys: Any) -> tuple[str, Path]:
    """A config that was trained, and its first checkpoint."""
    path: str = config()
    assert main(["train", "--config", path]) == 0
    capsys.readouterr()
    return path, sorted((tmp_path / "run" / "checkpoints").glob("000001-*"))[0]


def measured(run: Path, checkpoint: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((run / "cbs" / checkpoint.name / "cbs.json").read_text())
    return result


def test_branches_compare_and_are_not_run_again(
    trained: tuple[str, Path], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, checkpoint = trained
    command = ["cbs", "--config", path, f"--branch_from={checkpoint}", *BRANCHES]
    journal = (tmp_path / "run" / "journal.jsonl").read_bytes()
    assert main(command) == 0
    said = capsys.readouterr().out
    for words in ("critical batch: ", "noise scale there: ", "batch 256", "Critical batch by smoothed training loss"):
        assert words in said
    found = measured(tmp_path / "run", checkpoint)
    assert [(row["size"], row["steps"]) for row in found["branches"]] == [(16, 64), (64, 16), (256, 4)]
    rates = [row["lr"] for row in found["branches"]]
    assert rates[1] / rates[0] == pytest.approx(2, rel=1e-6), "the rule of the job, sqrt"
    assert rates[2] / rates[0] == pytest.approx(4, rel=1e-6)
    assert found["critical_batch"] in (16, 64, 256)
    assert found["noise_scale"] > 0
    assert found["critical_batch_over_noise_scale"] == found["critical_batch"] / found["noise_scale"]
    folder = tmp_path / "run" / "cbs" / checkpoint.name
    assert (folder / "cbs.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "run" / "journal.jsonl").read_bytes() == journal, "the run itself is left alone"

    # Another tolerance and another loss need no other branches.
    monkeypatch.setattr(cbs, "run_branch", None)
    assert main([*command, "--tolerance=1000", "--judge=test"]) == 0
    said = capsys.readouterr().out
    assert "finished already: batch 16, 64, 256" in said
    assert "critical batch: at least 256" in said
    again = measured(tmp_path / "run", checkpoint)
    assert [row["loss"] for row in again["branches"]] == [row["test_loss"] for row in found["branches"]]


def test_other_settings_are_other_branches(trained: tuple[str, Path], tmp_path: Path) -> None:
    path, checkpoint = trained
    command = ["cbs", "--config", path, f"--branch_from={checkpoint}", *BRANCHES]
    assert main(command) == 0
    first = measured(tmp_path / "run", checkpoint)
    assert main([*command, "--lr_rule=linear"]) == 0
    other = measured(tmp_path / "run", checkpoint)
    assert other["branches"][1]["lr"] == pytest.approx(first["branches"][1]["lr"] * 2, rel=1e-6)
    assert other["branches"][1]["loss"] != first["branches"][1]["loss"]


def test_a_branch_at_the_batch_of_a_constant_run_goes_on_as_the_run_did(config: Any, tmp_path: Path) -> None:
    """At a constant learning rate: the losses of the run's own journal."""
    constant = {"class_path": "adabatch.Constant", "init_args": {"global_batch_size": 32}}
    path = config(
        criterion=constant,
        shape={"class_path": "adabatch.lr.constant"},
        limits={"min": 32, "max": 32},
        measure={"monitor": True},
    )
    assert main(["train", "--config", path]) == 0
    run = tmp_path / "run"
    checkpoint = sorted((run / "checkpoints").glob("000001-*"))[0]
    command = ["cbs", "--config", path, f"--branch_from={checkpoint}", "--factors", "1", "2", "--examples=512"]
    assert main(command) == 0
    branch = json.loads((run / "cbs" / checkpoint.name / "batch-000032.json").read_text())["branch"]
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines() if '"plan"' in line]
    start = measured(run, checkpoint)["at"]["steps"]
    assert branch["losses"] == [line["loss"] for line in lines[start : start + 16]]


def test_time_that_is_over_leaves_branches_for_the_next_time(
    trained: tuple[str, Path], tmp_path: Path, capsys: Any
) -> None:
    path, checkpoint = trained
    command = ["cbs", "--config", path, f"--branch_from={checkpoint}", *BRANCHES]
    assert main([*command, "--max_minutes=1e-9"]) == 75
    said = capsys.readouterr()
    assert "the time was over before batch 16, 64, 256" in said.out
    assert "the same command continues" in said.err
    assert main(command) == 0


@pytest.mark.slow
def test_branches_side_by_side_are_those_in_turn(trained: tuple[str, Path], tmp_path: Path) -> None:
    path, checkpoint = trained
    command = ["cbs", "--config", path, f"--branch_from={checkpoint}", *BRANCHES]
    assert main([*command, "--processes=2"]) == 0
    beside = measured(tmp_path / "run", checkpoint)
    for branch in (tmp_path / "run" / "cbs" / checkpoint.name).glob("batch-*.json"):
        branch.unlink()
    assert main(command) == 0
    in_turn = measured(tmp_path / "run", checkpoint)
    for one, other in zip(beside["branches"], in_turn["branches"], strict=True):
        # Sums of float32 over other numbers of threads, through up to 64 steps.
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--factors", "1"], "factors must be at least two positive numbers"),
        (["--factors", "1", "1.01", "--smallest=16"], "factors must make whole batch sizes of the smallest, 16"),
        (["--smallest=12"], "12"),
        (["--examples=300", "--smallest=16"], "examples=300 are fewer than two steps of the largest batch, 256"),
        (["--tolerance=0"], "tolerance must be a positive share"),
        (["--judge=validation"], "judge must be one of train, test"),
        (["--branch_from=nowhere"], "there is no checkpoint in nowhere"),
        ([], "is 0, so that no branch could train"),
    ],
)
def test_mistakes_are_one_line(options: list[str], words: str, trained: tuple[str, Path], capsys: Any) -> None:
    path, checkpoint = trained
    where = [f"--branch_from={checkpoint}"] if options and not options[0].startswith("--branch") else []
    try:
        status = main(["cbs", "--config", path, *where, *options])
    except SystemExit as stopped:
        status = stopped.code  # type: ignore[assignment]
    error = capsys.readouterr().err
    assert status == 2
    assert words in error
    assert error.count("\n") == 1
