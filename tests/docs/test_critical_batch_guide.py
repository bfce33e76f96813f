"""The code of docs/critical_batch.md runs as it stands, and its options are those of the command."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from adabatch.cli.branch import CriticalOptions

TEXT = (Path(__file__).parents[2] / "docs" / "critical_batch.md").read_text(encoding="utf-8")


def test_the_python_of_the_guide_runs(capsys: Any) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    with torch.random.fork_rng(devices=[]):
        exec(compile(block, "docs/critical_batch.md", "exec"), {})
    assert re.fullmatch(r"\d+ examples, \d+\.\d\d times the noise scale\n", capsys.readouterr().out)


def test_the_table_has_every_option() -> None:
    rows = [line.split("|")[1] for line in TEXT.splitlines() if line.startswith("| `--")]
    named = {name for row in rows for name in re.findall(r"`--(\w+)`", row)}
    assert named - {"lr_rule"} == set(CriticalOptions.__dataclass_fields__)
