"""Sinks of the journal, and the trackers among them: the same names in each, and none that can stop a run."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import adabatch
from adabatch.cli.main import main
from adabatch.integrations.trackers import (
    MLflowTracker,
    TensorBoardTracker,
    TrackioTracker,
    metrics_of,
    tracker_of,
)
from adabatch.journal.writer import Journal

ENTRY: dict[str, Any] = {
    "format": 1,
    "step": 3,
    "examples": 96,
    "plan": {"micro_batch_size": 8, "accumulation_steps": 4, "dp_size": 1, "global_batch_size": 32},
    "loss": 0.5,
    "moments": {"noise": 10.0, "signal": 0.5, "noise_scale": 20.0},
    "norms": {"l2": 0.7, "l1": None},
    "averages": {"noise": 12.0, "signal": 0.125, "noise_scale": 96.0},
    "wanted": 96.0,
    "low": 48.0,
    "high": math.inf,
    "freedom": 6.0,
    "next": 64,
    "reason": "grow",
    "lr": {"base": [0.1, 0.2], "shape": [1.0, 1.0], "factor": 2.0, "applied": [0.2, 0.4]},
    "applied": True,
    "layers": {"head": {"noise": 4.0, "signal": 0.5, "noise_scale": 8.0}},
}

METRICS = {
    "loss": 0.5,
    "examples": 96,
    "batch/taken": 32,
    "batch/micro": 8,
    "batch/accumulation": 4,
    "batch/wanted": 96,
    "batch/low": 48,
    "batch/next": 64,
    "noise/scale": 96,
    "noise/noise": 12,
    "noise/signal": 0.125,
    "noise/scale_of_step": 20,
    "noise/freedom": 6,
    "gradient/l2": 0.7,
    "lr/factor": 2,
    "lr/base": 0.1,
    "lr/base_1": 0.2,
    "lr/shape": 1,
    "lr/shape_1": 1,
    "lr/applied": 0.2,
    "lr/applied_1": 0.4,
    "update/applied": 1,
    "efficiency": 0.75,
    "layers/head/noise_scale": 8,
}


class Kept:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        self.closed = 0

    def write(self, entry: Any) -> None:
        self.entries.append(dict(entry))

    def close(self) -> None:
        self.closed += 1


class Broken(Kept):
    """A sink that fails at its second line, and when it is closed."""

    def write(self, entry: Any) -> None:
        super().write(entry)
        if len(self.entries) == 2:
            raise ConnectionError("no network")

    def close(self) -> None:
        raise OSError("closing failed")


def trained(journal: Any, *, num_steps: int = 4) -> adabatch.AdaptiveBatch:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = adabatch.AdaptiveBatch(
        model,
        optimizer,
        adabatch.NormTest(0.5),
        micro_batch_size=4,
        limits=adabatch.Limits(min=8, max=32),
        journal=journal,
    )
    data = torch.utils.data.TensorDataset(torch.randn(256, 4))
    for step in batches.steps(torch.utils.data.DataLoader(data, batch_size=4), until=adabatch.steps(num_steps)):
        for (x,) in step:
            step.backward(model(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    return batches


def test_the_numbers_have_their_names():
    assert metrics_of(ENTRY) == pytest.approx(METRICS)
    assert metrics_of({"step": 0, "lr": None, "averages": None, "applied": False}) == {"update/applied": 0}


def test_an_evaluation_has_its_names_and_stands_at_the_step_before_it():
    logged = []

    class Tracked(TensorBoardTracker):
        def __init__(self) -> None:
            self._opened = False

        def _open(self, run: str, step: int) -> None:
            logged.append(step)

        def _log(self, step: int, metrics: Any) -> None:
            logged.append((step, dict(metrics)))

    evaluation = {"format": 1, "step": 4, "examples": 128, "evaluation": {"loss": 0.25, "top 5": None}}
    assert metrics_of(evaluation) == {"evaluation/loss": 0.25}
    # A run that resumes at step 4 purges what was logged at that step and later.
    Tracked().write(evaluation)
    assert logged == [4, (3, {"evaluation/loss": 0.25})]


def test_a_loop_records_its_evaluations_between_steps(tmp_path):
    sink = Kept()
    batches = trained([tmp_path / "journal.jsonl", sink])
    batches.record_evaluation({"loss": torch.tensor(0.5)})
    assert sink.entries[-1]["evaluation"] == {"loss": 0.5}
    assert (sink.entries[-1]["step"], sink.entries[-1]["examples"]) == (4, batches.consumed.examples)
    assert json.loads((tmp_path / "journal.jsonl").read_text().splitlines()[-1]) == sink.entries[-1]


def test_an_evaluation_inside_a_step_is_refused(tmp_path):
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sink = Kept()
    batches = adabatch.AdaptiveBatch(model, optimizer, adabatch.Constant(8), micro_batch_size=4, journal=sink)
    for step in batches.steps([torch.randn(4, 4) for _ in range(4)]):
        for x in step:
            with pytest.raises(RuntimeError, match="an evaluation belongs between two steps, and `for batch in step`"):
                batches.record_evaluation({"loss": 1.0})
            step.backward(model(x).square().mean())
        with pytest.raises(RuntimeError, match=r"optimizer\.step\(\) has not been run to its end: record it after"):
            batches.record_evaluation({"loss": 1.0})
        optimizer.step()
        optimizer.zero_grad()
        batches.record_evaluation({"loss": 0.25})
    assert [entry["step"] for entry in sink.entries if "evaluation" in entry] == [1, 2]


def test_a_sink_gets_what_the_file_gets(tmp_path):
    sink = Kept()
    trained([tmp_path / "run.jsonl", sink]).remove()
    assert [json.loads(text) for text in (tmp_path / "run.jsonl").read_text().splitlines()] == sink.entries
    assert len(sink.entries) == 4
    assert sink.closed == 1


def test_a_sink_alone_is_a_journal():
    sink = Kept()
    batches = trained(sink)
    assert batches.journal.path is None
    assert [entry["step"] for entry in sink.entries] == [0, 1, 2, 3]
    assert {entry["run"] for entry in sink.entries} == {batches.journal.run}


def test_what_is_not_finite_reaches_no_sink():
    sink = Kept()
    Journal(sink).write(ENTRY)
    assert sink.entries[0]["high"] is None


def test_a_sink_that_fails_is_named_once_and_stops_nothing(tmp_path, caplog):
    broken, whole = Broken(), Kept()
    with caplog.at_level(logging.WARNING, logger="adabatch"):
        trained([broken, tmp_path / "run.jsonl", whole]).remove()
    said = [record.getMessage() for record in caplog.records if "Broken" in record.getMessage()]
    assert said == ["Broken failed and is given no more lines (ConnectionError: no network); the run goes on"]
    assert len(broken.entries) == 2
    assert len(whole.entries) == len((tmp_path / "run.jsonl").read_text().splitlines()) == 4
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="adabatch"):
        Journal(Broken()).close()
    assert "closing failed" in caplog.text


def test_what_is_no_target_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"a path, a sink with write\(\) and close\(\), or a list"):
        Journal(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got 3"):
        Journal([tmp_path / "a", 3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="a run has one journal"):
        Journal([tmp_path / "a", tmp_path / "b"])


def test_a_package_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("tensorboard", "wandb", "mlflow", "trackio"):
        with pytest.raises(ImportError, match=f"pip install {name}"):
            tracker_of(name, tmp_path)


def test_an_unknown_tracker_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"one of tensorboard, wandb, mlflow, trackio, got 'aim'"):
        tracker_of("aim", tmp_path)


def need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the packages' own making
def test_tensorboard(tmp_path):
    need("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = TensorBoardTracker(tmp_path)
    journal = Journal(tracker)
    journal.write(ENTRY)
    tracker.close()
    journal.write({**ENTRY, "step": 4})  # opens it again
    journal.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == set(METRICS)
    assert [event.step for event in events.Scalars("loss")] == [3, 4]
    assert events.Scalars("efficiency")[0].value == 0.75


IN_WANDB = """
import json, sys
from adabatch.integrations.trackers import WandbTracker
from adabatch.journal.writer import Journal

entry, tracker = json.load(sys.stdin), WandbTracker("adabatch", folder=".", mode="offline")
journal = Journal(tracker)
journal.write(entry)
journal.write({**entry, "step": 4})  # by which the step before is complete
run = tracker._run
said = {"summary": dict(run.summary), "same": run.id == journal.run}
journal.close()
print(json.dumps(said))
"""


@pytest.mark.slow
def test_wandb_offline(tmp_path):
    need("wandb")
    # In a process of its own: it starts a service, and leaves threads and environment variables behind.
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IN_WANDB],
        input=json.dumps({**ENTRY, "high": None}),
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false", "HOME": str(tmp_path)},
    )
    assert "given no more lines" not in done.stderr
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["same"]
    assert {name: said["summary"][name] for name in METRICS} == pytest.approx(METRICS)
    assert said["summary"]["_step"] == 3
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mlflow_in_a_folder(tmp_path, monkeypatch):
    need("mlflow")
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    tracker = MLflowTracker(tmp_path / "store", name="first")
    journal = Journal(tracker)
    journal.write(ENTRY)
    tracker.close()
    journal.write({**ENTRY, "step": 4})
    journal.close()
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "store").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("adabatch").experiment_id])
    assert run.info.run_name == "first"
    assert run.info.status == "FINISHED"
    assert run.data.metrics == pytest.approx(METRICS)
    assert [each.step for each in client.get_metric_history(run.info.run_id, "loss")] == [3, 4]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_trackio(tmp_path, monkeypatch):
    need("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    # Its modules read the variable when they are imported, which another test may have done.
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "trackio" and hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path)
    journal = Journal(TrackioTracker("adabatch-test", name="first"))
    journal.write(ENTRY)
    journal.close()
    with closing(sqlite3.connect(tmp_path / "adabatch-test.db")) as stored:
        ((run, step, metrics),) = stored.execute("select run_name, step, metrics from metrics").fetchall()
    assert (run, step) == ("first", 3)
    assert json.loads(metrics) == pytest.approx(METRICS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_config_names_trackers(tmp_path, monkeypatch, capsys):
    need("tensorboard")
    config = yaml.safe_load((Path(__file__).parent.parent / "configs" / "quickstart.yaml").read_text())
    config |= {"trackers": ["tensorboard"], "total": {"count": 512, "unit": "examples"}, "out": str(tmp_path / "run")}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["train", f"--config={path}"]) == 0, capsys.readouterr().err
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.*"))
