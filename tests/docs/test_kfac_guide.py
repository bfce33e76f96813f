"""The code of docs/kfac.md runs as it stands, and its tables leave nothing out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import torch

from adabatch.optim.kfac import DampingName
from adabatch.optim.kfac.curvature import Fisher

GUIDE = Path(__file__).parents[2] / "docs" / "kfac.md"
TEXT = GUIDE.read_text(encoding="utf-8")


def test_the_python_of_the_guide_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(blocks) == 2
    namespace: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        for block in blocks:
            exec(compile(block, str(GUIDE), "exec"), namespace)
    assert namespace["loss"] < 0.75  # of targets without a pattern, which begin at 1.1
    assert namespace["batches"].consumed.examples >= 2048


def test_every_form_of_damping_and_curvature_is_in_a_table() -> None:
    cells = " ".join(line for line in TEXT.splitlines() if line.startswith("|"))
    assert not [name for name in (*get_args(DampingName), *get_args(Fisher)) if f'`"{name}"`' not in cells]
