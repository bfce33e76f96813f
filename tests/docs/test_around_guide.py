"""The code of docs/around_a_step.md runs as it stands. Its table is tests/distributed/test_around_a_step.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

GUIDE = Path(__file__).parents[2] / "docs" / "around_a_step.md"


def test_the_python_of_the_guide_runs(capsys: Any) -> None:
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 4
    namespace: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        for block in blocks:
            exec(compile(block, str(GUIDE), "exec"), namespace)
    assert namespace["batches"].consumed.examples >= 512
    assert namespace["thawed"].progress.examples >= 1024
    assert [group["initial_lr"] for group in namespace["head"].param_groups] == [0.1, 0.01]
    assert namespace["joint"].progress.examples >= 512
    assert "noise scale" in capsys.readouterr().out
