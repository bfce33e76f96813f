"""The code of docs/data.md runs as it stands, and its table leaves no shuffle out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

import adabatch

GUIDE = Path(__file__).parents[2] / "docs" / "data.md"
TEXT = GUIDE.read_text(encoding="utf-8")


def test_the_python_of_the_guide_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(blocks) >= 4
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), namespace)
    assert isinstance(namespace["order"], adabatch.GlobalOrder)
    (comment,) = re.findall(r"^# (\{.*\})$", TEXT, flags=re.MULTILINE)
    assert comment == str(adabatch.GlobalOrder(torch.utils.data.TensorDataset(torch.arange(1000.0))).state_dict())


def test_every_shuffle_is_in_the_table() -> None:
    cells = " ".join(line for line in TEXT.splitlines() if line.startswith("|"))
    names = [name for name in adabatch.data.__all__ if name.endswith("Shuffle") and name != "Shuffle"]
    assert len(names) == 4
    assert not [name for name in names if f"{name}(" not in cells]
