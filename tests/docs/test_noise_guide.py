"""The code of docs/noise.md runs as it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

GUIDE = Path(__file__).parents[2] / "docs" / "noise.md"


def test_the_python_of_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 2
    namespace: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        for block in blocks:
            exec(compile(block, str(GUIDE), "exec"), namespace)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "adam ['0', '2']"
    assert second.startswith("head ")
    lines = [json.loads(line) for line in (tmp_path / "runs/noise/journal.jsonl").read_text().splitlines()]
    assert [line["reason"] for line in lines].count("not probed") == 1
    assert lines[-1]["layers"].keys() == {"0", "2"}
