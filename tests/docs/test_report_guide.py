"""The code of docs/report.md runs as it stands, and its table names what there is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from adabatch.integrations import trackers

GUIDE = Path(__file__).parents[2] / "docs" / "report.md"


def test_the_python_of_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
    with torch.random.fork_rng(devices=[]):
        exec(compile(block, str(GUIDE), "exec"), {})
    assert capsys.readouterr().out.splitlines() == [
        "['batch/accumulation', 'batch/low', 'batch/micro', 'batch/next']",
        "closed",
    ]
    lines = (tmp_path / "runs/tracked/journal.jsonl").read_text().splitlines()
    *steps, evaluation = map(json.loads, lines)
    assert sum(step["plan"]["global_batch_size"] for step in steps) == 256
    assert list(evaluation["evaluation"]) == ["loss"]


def test_the_table_names_every_tracker() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    for name in get_args(trackers.TrackerName):
        assert f"`trackers: [{name}]`" in text
    classes = re.findall(r"\| `(\w+Tracker)\(", text)
    assert len(classes) == len(get_args(trackers.TrackerName))
    assert all(issubclass(getattr(trackers, each), trackers.Tracker) for each in classes)
