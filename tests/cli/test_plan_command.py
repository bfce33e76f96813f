"""`adabatch plan` as a person types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adabatch.cli.main import main

STEP, EXAMPLE, NOISE = 0.02, 0.001, 400.0
CLUSTER = ["--devices=8", "--bandwidth=1e9", "--latency=1e-5", "--parameters=1e6", "--price_per_hour=3"]


def write_run(folder: Path, *, timed: bool = True, noise: float | None = NOISE) -> Path:
    """Steps of 32 and 64 examples, whose times are exactly those of the model."""
    folder.mkdir()
    lines, examples = [], 0
    for step in range(40):
        micro = 32 if step % 2 else 64
        measured = None if noise is None else {"noise": noise, "signal": 1.0, "noise_scale": noise}
        plan = {"micro_batch_size": micro, "accumulation_steps": 1, "dp_size": 1, "global_batch_size": micro}
        line = {"format": 1, "step": step, "examples": examples, "plan": plan, "loss": 1.0, "applied": True}
        line |= {"moments": measured, "averages": measured, "next": micro, "reason": "hold"}
        if noise is not None:
            line |= {"wanted": noise, "low": 0.5 * noise, "high": 2 * noise}
        if timed:
            line["seconds"] = STEP + EXAMPLE * micro
        lines.append(json.dumps(line))
        examples += micro
    (folder / "journal.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def planned(capsys, *arguments: str) -> dict:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_numbers_of_a_journal(tmp_path, capsys):
    told = planned(capsys, str(write_run(tmp_path / "a")), *CLUSTER)
    assert set(told) == {
        "format", "source", "settings", "forecast", "scales", "knee_devices", "notes", "assumptions"
    }  # fmt: skip
    assert told["source"] == "the journal of a"
    assert [each["devices"] for each in told["scales"]] == [8, 64, 1000, 10_000]
    here = told["forecast"]
    assert here == told["scales"][0]
    # Eight devices: a step, and the fastest all-reduce of 4 MB, which is a ring.
    reduce = 14 * (1e-5 + 4e6 / 8 / 1e9)
    assert here["price"] == pytest.approx(8 * (STEP + reduce) / EXAMPLE, rel=0.05)
    assert here["batch"]["point"] == pytest.approx((NOISE * here["price"]) ** 0.5)
    for name in ("steps", "hours", "batch"):
        assert here[name]["low"] <= here[name]["point"] <= here[name]["high"]
    assert here["money"]["point"] == pytest.approx(3 * here["device_hours"]["point"])
    assert told["settings"]["criterion.examples"] == pytest.approx(here["price"], rel=0.05)
    assert told["settings"]["micro_batch_size"] == 64
    assert told["settings"]["limits.min"] <= here["batch"]["point"] <= told["settings"]["limits.max"]


def test_text_and_figure(tmp_path, capsys):
    figure = tmp_path / "pictures" / "plan.png"
    assert main(["plan", str(write_run(tmp_path / "a")), *CLUSTER, "--figure", str(figure)]) == 0
    told = capsys.readouterr().out
    assert told.startswith("Plan from the journal of a\n")
    for part in ("device-hours", "Knee: ", "Assumptions", "StepPrice", "10,000"):
        assert part in told
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_a_first_guess_says_that_it_is_one(capsys):
    told = planned(
        capsys, "--examples=1e6", "--tokens_per_example=2048", "--flops=1e14", "--step_seconds=0.1", *CLUSTER
    )
    assert "2505.13738" in told["source"]
    assert any(note.startswith("No run was measured.") for note in told["notes"])
    steps = told["forecast"]["steps"]
    assert steps["high"] > 1.5 * steps["low"]


def test_a_longer_run_is_told_of(tmp_path, capsys):
    run = str(write_run(tmp_path / "a"))
    short, long = planned(capsys, run, *CLUSTER), planned(capsys, run, *CLUSTER, "--examples=19200")
    assert long["forecast"]["steps"]["point"] == pytest.approx(10 * short["forecast"]["steps"]["point"], rel=0.05)
    assert any(note.startswith("Beyond the 1,920 examples") for note in long["notes"])


def test_memory_gives_the_micro_batch(tmp_path, capsys):
    run = str(write_run(tmp_path / "a"))
    told = planned(capsys, run, *CLUSTER, "--memory=1e9", "--example_bytes=1e7")
    assert told["settings"]["micro_batch_size"] == 64  # (0.9e9 - 16e6) / 1e7 = 88
    assert main(["plan", run, *CLUSTER, "--memory=1e7", "--example_bytes=1e7"]) == 2
    assert "not one example fits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --examples and --tokens_per_example"),
        (["--examples=1e6", "--tokens_per_example=10", "--bandwidth=1e9"], "nothing says how long a step takes"),
    ],
)
def test_too_little_to_go_by(arguments, message, capsys):
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_journal_that_lacks_something(tmp_path, capsys):
    assert main(["plan", str(write_run(tmp_path / "a", timed=False)), *CLUSTER]) == 2
    assert "no step times" in capsys.readouterr().err
    assert main(["plan", str(write_run(tmp_path / "b", noise=None)), *CLUSTER]) == 2
    assert "no noise scale" in capsys.readouterr().err
    assert main(["plan", str(tmp_path / "a"), "--example_seconds=0.001", "--step_seconds=0.1"]) == 2
    assert "--bandwidth" in capsys.readouterr().err
