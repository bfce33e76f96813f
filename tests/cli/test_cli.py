"""The command as a person uses it: files in, files out, and one clear line for each mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from support.jobs import Attempt
from support.loops import journal_text

from adabatch.checkpointing.files import checkpoints_in
from adabatch.cli.main import main
from adabatch.cli.runs import find_runs
from adabatch.cli.schedule.recorded import read_run
from adabatch.lr.rules import gain

pytest.importorskip("sklearn", reason="the digits need scikit-learn (extra cli)")

CONFIG: dict[str, Any] = {
    "format": 1,
    "model": {"class_path": "adabatch.recipes.models.MLP"},
    "loss": {"class_path": "torch.nn.CrossEntropyLoss"},
    "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}},
    "train_data": {"class_path": "adabatch.recipes.digits.Digits", "init_args": {"split": "train"}},
    "test_data": {"class_path": "adabatch.recipes.digits.Digits", "init_args": {"split": "test"}},
    "criterion": {"class_path": "adabatch.NormTest", "init_args": {"eta": 0.5}},
    "micro_batch_size": 8,
    "max_micro_batch_size": 64,
    "limits": {"min": 16, "max": 256},
    "lr_rule": "gain",
    "shape": {"class_path": "adabatch.lr.cosine"},
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


class HungryLoss(torch.nn.CrossEntropyLoss):
    """Asks for more memory than there is, above 16 examples."""

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if len(inputs) > 16 and inputs.requires_grad:
            torch.empty(1 << 60, dtype=torch.uint8)
        return super().forward(inputs, targets)


def saved_state(run: Path) -> dict[str, Any]:
    """What the newest checkpoint of a run holds."""
    newest = next(iter(checkpoints_in(run / "checkpoints").values()))
    state: dict[str, Any] = torch.load(newest / "state.pt", weights_only=True)
    return state


def lines(path: Path) -> list[dict[str, Any]]:
    return [line for text in path.read_text().splitlines() if "plan" in (line := json.loads(text))]


def test_train_writes_journal_checkpoint_and_picture(config: Any, tmp_path: Path, capsys: Any) -> None:
    assert main(["train", "--config", config()]) == 0
    run = tmp_path / "run"
    journal = lines(run / "journal.jsonl")
    assert journal[0]["plan"]["global_batch_size"] == 16
    assert max(line["plan"]["global_batch_size"] for line in journal) > 16
    assert sum(line["plan"]["global_batch_size"] for line in journal) >= 3000
    assert all(line["applied"] for line in journal)
    assert (run / "picture.png").read_bytes().startswith(b"\x89PNG")
    state = saved_state(run)
    assert state["batches"]["consumed"]["examples"] >= 3000
    out = capsys.readouterr().out
    for word in ("examples", "loss", "batch", "lr", "noise scale", "test accuracy"):
        assert word in out


def test_flags_override_the_file(config: Any, tmp_path: Path) -> None:
    assert main(["train", "--config", config(), "--limits.max=32", "--total.count=600"]) == 0
    journal = lines(tmp_path / "run" / "journal.jsonl")
    assert max(line["plan"]["global_batch_size"] for line in journal) <= 32
    assert sum(line["plan"]["global_batch_size"] for line in journal) < 700


def test_the_norms_for_a_refined_adam_schedule_are_one_flag_away(config: Any, tmp_path: Path) -> None:
    """As are the noises of layers, and another criterion."""
    flags = ["--measure.l1=true", "--measure.layers=module", "--criterion=adabatch.NoiseScale", "--criterion.norm=sign"]
    assert main(["train", "--config", config(), *flags, "--total.count=600"]) == 0
    run = tmp_path / "run"
    for line in lines(run / "journal.jsonl"):
        assert line["norms"]["l1"] > line["norms"]["l2"]
        assert (line["moments"]["norm"], len(line["layers"])) == ("sign", 2)
    assert main(["schedule", "refine", str(run), "--kind=adam"]) == 0
    other = ["--config", str(run / "refined.yaml"), "--total.count=600", f"--out={tmp_path / 'refined'}"]
    assert main(["train", "--config", config(), *other]) == 0


@pytest.mark.parametrize(
    ("total", "clock", "unit"),
    [
        ({"count": 96_000, "unit": "tokens"}, "total", "tokens"),
        ({"count": 30, "unit": "steps"}, "total", "steps"),
        ({"count": 60, "unit": "gain_steps"}, "total", "gain_steps"),
        ({"count": 1500, "unit": "examples"}, "gain", "gain_steps"),
    ],
    ids=lambda value: str(value),
)
def test_the_schedule_runs_on_the_clock_of_the_config(
    total: dict[str, Any], clock: str, unit: str, config: Any, tmp_path: Path
) -> None:
    """The shape that the journal says was applied, against what its lines say was consumed before it."""
    shape = {"class_path": "adabatch.lr.linear"}
    flags = {"total": total, "clock": clock, "shape": shape, "tokens_per_example": 64}
    assert main(["train", "--config", config(**flags)]) == 0
    recorded = read_run(tmp_path / "run")
    assert recorded.batch.max() > recorded.batch.min(), "only a batch that moves tells clocks apart"
    examples, gains = recorded.edges("examples", 16), recorded.edges("gain_steps", 16)
    consumed = {
        "examples": examples,
        "tokens": 64 * examples,
        "steps": recorded.edges("steps", 16),
        "gain_steps": gains,
    }
    expected = consumed[unit][:-1] / total["count"]
    if clock == "gain":  # what is left is worth as much as the next step says, with all that was measured before it
        averages = zip(recorded.batch[1:], recorded.noise, recorded.signal, strict=False)
        worth = np.array([gain(b / 16, 16, noise=n, signal=s) / b for b, n, s in averages])
        left = np.maximum(0, total["count"] - examples[1:-1]) * worth
        expected = np.maximum.accumulate([0.0, *(gains[1:-1] / (gains[1:-1] + left))])
    np.testing.assert_allclose(1 - recorded.shape, np.minimum(expected, 1), rtol=1e-9, atol=1e-9)
    assert consumed[total["unit"]][-1] >= total["count"] > consumed[total["unit"]][-2], "the run ends with its total"
    again = main(["train", "--config", config(**{**flags, "clock": {"total": "gain", "gain": "total"}[clock]})])
    assert again == 2, "a resume with another clock is refused"


def test_print_config_shows_every_field_and_reads_back(config: Any, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as done:
        main(["train", "--config", config(), "--print_config"])
    assert done.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["criterion"]["init_args"] == {"eta": 0.5, "population": None}
    shown["total"]["count"] = 200
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(shown))
    assert main(["train", "--config", str(again)]) == 0


def test_a_run_that_was_cut_off_and_resumed_equals_one_that_was_not(config: Any, tmp_path: Path, capsys: Any) -> None:
    loss = {"class_path": f"{__name__}.InterruptedLoss"}
    often = {"every": {"count": 500, "unit": "examples"}, "keep": 2}
    whole = config(loss=loss, checkpoint=often, out=str(tmp_path / "whole"))
    assert main(["train", "--config", whole]) == 0
    assert len(checkpoints_in(tmp_path / "whole" / "checkpoints")) == 2
    parts = config(loss=loss, checkpoint=often, out=str(tmp_path / "parts"))
    InterruptedLoss.calls_left = 90
    with pytest.raises(Interrupted):
        main(["train", "--config", parts])
    assert main(["train", "--config", parts]) == 0
    assert "resuming from" in capsys.readouterr().out
    assert journal_text(tmp_path / "whole/journal.jsonl") == journal_text(tmp_path / "parts/journal.jsonl")
    one, two = (saved_state(tmp_path / name) for name in ("whole", "parts"))
    assert one["batches"] == two["batches"]
    assert one["order"] == two["order"]
    for name, value in one["model"].items():
        assert torch.equal(value, two["model"][name])


def test_compare_runs_the_job_and_both_constants(config: Any, tmp_path: Path, capsys: Any) -> None:
    assert main(["compare", "--config", config(total={"count": 1000, "unit": "examples"})]) == 0
    rows = json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert [row["label"] for row in rows] == ["adaptive", "constant 16", "constant 256"]
    assert rows[1]["steps"] == 63
    assert rows[2]["steps"] == 4
    assert rows[2]["steps"] < rows[0]["steps"] < rows[1]["steps"]
    # Same weights, same order: the first step of the job is the first step of the smallest constant.
    first, small = (lines(tmp_path / "run" / name)[0]["loss"] for name in ("journal.jsonl", "smallest/journal.jsonl"))
    assert first == small
    assert "At equal examples" in capsys.readouterr().out
    # A report finds the settings of each.
    configs = [run.config for run in find_runs([str(tmp_path / "run")])]
    assert [config["criterion.class_path"].rpartition(".")[2] for config in configs] == ["NormTest", *["Constant"] * 2]
    assert [config["reference_batch_size"] for config in configs] == [16] * 3


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"criterion": {"class_path": "adabatch.NoSuchTest"}}, ["NoSuchTest"]),
        ({"criterion": {"class_path": "adabatch.NormTest", "init_args": {"eta": 0.5, "zeta": 1}}}, ["zeta"]),
        ({"micro_batch_sise": 8}, ["micro_batch_sise"]),
        ({"micro_batch_size": "eight"}, ["micro_batch_size", "eight"]),
        ({"lr_rule": "cubic"}, ["lr_rule", "cubic"]),
        ({"criterion": {"class_path": "adabatch.NormTest", "init_args": {"eta": -0.5}}}, ["eta", "-0.5", "positive"]),
        ({"limits": {"min": 256, "max": 16}}, ["256", "16", "crossed"]),
        ({"micro_batch_size": 32}, ["micro_batch_size", "limits.min=16"]),
        ({"limits": {"min": 16, "max": 4096}}, ["4096", "1437"]),
        ({"format": 2}, ["format 2", "format 1"]),
        ({"total": {"count": 0, "unit": "examples"}}, ["total"]),
        ({"total": {"count": 10, "unit": "epochs"}}, ["epochs"]),
        (
            {"train_data": {"class_path": "adabatch.recipes.data.Mnist", "init_args": {"root": "/no/such/folder"}}},
            ["/no/such/folder"],
        ),
    ],
)
def test_mistakes_end_in_one_clear_line(config: Any, tmp_path: Path, capsys: Any, changes: Any, words: Any) -> None:
    try:
        status: Any = main(["train", "--config", config(**changes)])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    for word in words:
        assert word in error
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_missing_config_file_is_named(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--config", "/no/such/config.yaml"])
    assert stopped.value.code == 2
    assert "/no/such/config.yaml" in capsys.readouterr().err


@pytest.mark.distributed
def test_two_processes_choose_the_batch_sizes_of_one(config: Any, tmp_path: Path) -> None:
    """Parts of 8 examples either way, so the same measurement, the same decisions and the same journal."""
    path = config(max_micro_batch_size=None, control={"pace": float("inf")})
    assert Attempt(tmp_path, ["train", "--config", path, f"--out={tmp_path}/two"], 2).join() == [0, 0]
    assert main(["train", "--config", path, f"--out={tmp_path}/one"]) == 0
    one, two = (lines(tmp_path / name / "journal.jsonl") for name in ("one", "two"))
    assert [line["next"] for line in one] == [line["next"] for line in two]
    assert len({line["next"] for line in one}) > 3
    for a, b in zip(one, two, strict=True):
        assert a["moments"]["part_sq"] == pytest.approx(b["moments"]["part_sq"], rel=1e-3)


@pytest.mark.distributed
def test_a_mistake_ends_both_processes(config: Any, tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, ["train", "--config", config(limits={"min": 17, "max": 256})], 2)
    assert attempt.join() == [2, 2]
    said = (tmp_path / "output").read_text()
    assert said.count("limits.min=17 cannot be shared equally by 2 ranks") == 2
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_micro_batch_that_runs_out_of_memory_stays_as_it_was(config: Any, tmp_path: Path) -> None:
    assert main(["train", "--config", config(loss={"class_path": f"{__name__}.HungryLoss"})]) == 0
    written = lines(tmp_path / "run" / "journal.jsonl")
    assert [line["out_of_memory"] for line in written if "out_of_memory" in line] == [[32]]
    assert max(line["plan"]["micro_batch_size"] for line in written) == 16
    assert max(line["plan"]["global_batch_size"] for line in written) > 64


def test_a_run_without_a_folder_goes_on_in_its_own(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    loss = {"class_path": f"{__name__}.InterruptedLoss"}
    job = config(loss=loss, checkpoint={"every": {"count": 500, "unit": "examples"}}, out=None)
    InterruptedLoss.calls_left = 90
    with pytest.raises(Interrupted):
        main(["train", "--config", job])
    first = (tmp_path / "runs" / "latest").resolve()
    assert main(["train", "--config", job]) == 0
    assert "resuming from" in capsys.readouterr().out
    assert (tmp_path / "runs" / "latest").resolve() == first
    assert read_run(tmp_path / "runs" / "latest").num_steps > 0
    assert main(["train", "--config", job]) == 0
    assert (tmp_path / "runs" / "latest").resolve() != first


def test_a_learning_rate_given_on_resume_is_the_one_that_trains(
    config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    job = config(total={"count": 400, "unit": "examples"})
    assert main(["train", "--config", job]) == 0
    half = ["train", "--config", job, "--seed=3", "--optimizer.init_args.lr=3e-5", "--optimizer.init_args.momentum=0.5"]
    assert main(half) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "optimizer.lr was 0.1 when the checkpoint was saved, and is 3e-05 now" in said
    assert "config.optimizer" not in said
    assert "config.seed" not in said
    assert "optimizer.momentum stays 0.9, as it was saved" in caplog.text
    assert "data.seed stays 0, as it was saved" in caplog.text
    state = saved_state(tmp_path / "run")
    assert state["optimizer"]["param_groups"][0]["momentum"] == 0.9


def test_a_run_whose_updates_are_all_left_out_ends_with_a_status_of_its_own(
    config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = config(loss={"class_path": f"{__name__}.NoNumber"}, total={"count": 100_000, "unit": "examples"})
    assert main(["train", "--config", job]) == 77
    assert "the last 50 updates in a row were left out" in capsys.readouterr().err


class NoNumber(torch.nn.CrossEntropyLoss):
    """A run that has diverged."""

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return super().forward(outputs, targets) * torch.nan
