"""`adabatch report` as a person types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from adabatch.cli.main import main


def write_run(folder: Path, *, batch: int = 32, steps: int = 20, end: str = "", **config) -> Path:
    folder.mkdir(parents=True)
    measured = {"noise": 90.0, "signal": 1.0, "noise_scale": 90.0}
    lines = [
        {
            "format": 1,
            "step": step,
            "examples": step * batch,
            "plan": {"micro_batch_size": 8, "accumulation_steps": 4, "dp_size": 1, "global_batch_size": batch},
            "loss": 1.0 / (1 + step),
            "moments": measured,
            "averages": measured,
            "wanted": 90.0,
            "low": 50.0,
            "high": 150.0,
            "next": batch,
            "reason": "hold",
            "lr": {"base": [0.1], "shape": [1.0], "factor": 1.0, "applied": [0.1]},
            "applied": True,
            "run": folder.name,
        }
        for step in range(steps)
    ]
    (folder / "journal.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines) + end)
    if config:
        (folder / "run.json").write_text(json.dumps({"settings": config, "finished": False}))
    return folder


def test_one_page(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "a")
    assert main(["report", "runs/a"]) == 0
    assert capsys.readouterr().out.startswith("report: report.html (")
    assert "<title>a - adabatch report</title>" in (tmp_path / "report.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "runs"]


def test_a_run_that_still_runs(tmp_path, capsys):
    run = write_run(tmp_path / "a", end='{"format":1,"step":20,"exam')
    assert main(["report", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["summary"]["num_steps"] == 20


def test_numbers_of_several_runs(tmp_path, capsys):
    first = write_run(tmp_path / "a", batch=32, limits={"min": 16, "max": 32}, seed=0)
    second = write_run(tmp_path / "b", batch=64, limits={"min": 16, "max": 64}, seed=0)
    arguments = ["--json", "--step_price=10", "--what_if", "eta=0.6", "--out", str(tmp_path / "out" / "page.html")]
    assert main(["report", str(first), f"wide={second / 'journal.jsonl'}", *arguments]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in told["runs"]] == ["a", "wide"]
    assert told["differences"] == {"limits.max": [32, 64]}
    assert told["runs"][0]["flags"][0]["text"].startswith("100 % of the examples ran at limits.max (32).")
    names = [row["name"] for row in told["runs"][1]["what_if"]]
    assert names[0] == "as it ran"
    assert {"norm test, eta 0.6", "step price 10", "constant 64"} <= set(names)
    assert all(row["cost"] > 0 for row in told["runs"][1]["what_if"])
    assert (tmp_path / "out" / "page.html").is_file()


def test_a_comparison_stands_for_its_runs(tmp_path, capsys):
    folder = write_run(tmp_path / "both")
    write_run(folder / "smallest", batch=16)
    write_run(folder / "largest", batch=128)
    rows = [
        {"label": label, "test_loss": loss, "accuracy": None, "seconds": 1.5}
        for label, loss in (("adaptive", 0.1), ("constant 16", 0.2), ("constant 128", 0.3))
    ]
    (folder / "comparison.json").write_text(json.dumps(rows))
    assert main(["report", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["runs"]
    assert [run["name"] for run in told] == ["adaptive", "constant 16", "constant 128"]
    assert [run["results"]["test loss"] for run in told] == [0.1, 0.2, 0.3]


def test_pictures(tmp_path, capsys):
    run = write_run(tmp_path / "a")
    assert main(["report", str(run), "--png", str(tmp_path / "pictures")]) == 0
    written = {path.name: path.read_bytes() for path in (tmp_path / "pictures").iterdir()}
    charts = {"batch", "loss", "noise", "efficiency", "lr", "shape", "factor"}
    assert set(written) == {"report.png", *(f"{chart}.png" for chart in charts)}
    assert all(picture.startswith(b"\x89PNG") for picture in written.values())
    assert "pictures: " in capsys.readouterr().out
    assert main(["report", str(run), "--png", str(tmp_path), "--over", "time"]) == 2
    assert "no run counts time, which needs a criterion that reads step times" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere has no journal: give the folder of a run"),
        (["{run}", "--what_if", "eta=2"], "eta must lie between 0 and 1"),
        (["{run}", "--what_if", "colour=2"], "a choice is one of eta=NUMBER"),
        (["{run}", "--step_price=-1"], "--step_price: invalid number of zero or more value: '-1'"),
        (["{run}", "--tokens_per_example=0"], "invalid positive number value: '0'"),
        (["{run}", "--jso"], "unrecognized arguments: --jso"),
        ([], "the following arguments are required: RUN"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, arguments, said):
    run = write_run(tmp_path / "a")
    try:
        status = main(["report", *[each.format(run=run) for each in arguments]])
    except SystemExit as stopped:
        status = stopped.code
    told = capsys.readouterr()
    assert status == 2
    assert said in told.err
    assert told.err.count("\n") == 1
    assert told.out == ""


def test_an_empty_journal_is_named(tmp_path, capsys):
    run = write_run(tmp_path / "a", steps=0)
    assert main(["report", str(run)]) == 2
    assert "has no complete step yet" in capsys.readouterr().err


@pytest.mark.slow
def test_it_needs_none_of_the_extras(tmp_path):
    run = write_run(tmp_path / "a")
    blocked = "for name in ('jsonargparse', 'rich', 'yaml', 'matplotlib'): sys.modules[name] = None"
    code = (
        f"import sys\n{blocked}\nfrom adabatch.cli.main import main\nsys.exit(main(['report', {str(run)!r}, '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["runs"][0]["name"] == "a"
