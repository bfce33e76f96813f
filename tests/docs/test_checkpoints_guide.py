"""The code of docs/checkpoints.md runs as it stands, and its tables leave nothing out."""

from __future__ import annotations

import dataclasses
import inspect
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adabatch import EXIT_PREEMPTED, Checkpoints
from adabatch.cli.job import Checkpointing
from adabatch.guards import EXIT_NO_UPDATES, EXIT_RANK_LOST

GUIDE = Path(__file__).parents[2] / "docs" / "checkpoints.md"
TEXT = GUIDE.read_text(encoding="utf-8")
CELLS = " ".join(line for line in TEXT.splitlines() if line.startswith("|"))


@pytest.mark.slow
def test_the_python_of_the_guide_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(blocks) == 2
    namespace: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        for block in blocks:
            exec(compile(block, str(GUIDE), "exec"), namespace)
    random.setstate(python)
    np.random.set_state(legacy)  # noqa: NPY002
    assert namespace["batches"].consumed.examples >= 20_000
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "config.lr was 0.001 when the checkpoint was saved, and is 0.002 now"
    assert said[-1] in TEXT


def test_every_part_flag_and_status_is_in_a_table() -> None:
    parts = inspect.signature(Checkpoints).parameters.keys()
    settings = {"folder", "config", "every", "every_seconds", "keep", "background"}
    assert not [name for name in parts - settings if f"| `{name}` |" not in CELLS]
    assert all(f"`{name}=" in TEXT for name in settings - {"folder", "config"})
    flags = [field.name for field in dataclasses.fields(Checkpointing)]
    assert not [name for name in flags if f"`--checkpoint.{name}`" not in CELLS]
    assert all(f"| {status} |" in CELLS for status in (EXIT_PREEMPTED, EXIT_RANK_LOST, EXIT_NO_UPDATES))
