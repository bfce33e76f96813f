"""The code of docs/guards.md runs as it stands, and its tables are those of the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from support.loops import lines

from adabatch.cli.job import Job
from adabatch.guards.drift import AUTOMATIC
from adabatch.guards.finite import SkipNonfinite
from adabatch.guards.watchdog import EXIT_RANK_LOST

GUIDE = Path(__file__).parents[2] / "docs" / "guards.md"
TEXT = GUIDE.read_text(encoding="utf-8")


def test_the_python_of_the_guide_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    with torch.random.fork_rng(devices=[]):
        exec(compile(block, str(GUIDE), "exec"), {})
    assert capsys.readouterr().out == "None\n"
    assert max(line["plan"]["micro_batch_size"] for line in lines(tmp_path / "run" / "journal.jsonl")) > 16


def test_defaults_and_statuses_are_those_of_the_code() -> None:
    fields: dict[str, Any] = Job.__dataclass_fields__
    assert f"`hang_timeout: {fields['hang_timeout'].default:g}`" in TEXT
    assert fields["guard"].default.check_every == "auto"
    assert f"every {AUTOMATIC:,} steps" in TEXT
    assert TEXT.count(f"status {EXIT_RANK_LOST}") == 3
    _, word = get_args(SkipNonfinite)
    assert f'| `"{get_args(word)[0]}"` |' in TEXT
