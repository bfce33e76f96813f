"""The code of docs/local_sgd.md runs as it stands, and its tables leave nothing out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import torch

from adabatch import local_sgd

GUIDE = Path(__file__).parents[2] / "docs" / "local_sgd.md"
TEXT = GUIDE.read_text(encoding="utf-8")


def test_the_python_of_the_guide_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(blocks) == 2
    namespace: dict[str, Any] = {}
    made = []
    with torch.random.fork_rng(devices=[]):
        for block in blocks:
            exec(compile(block, str(GUIDE), "exec"), namespace)
            made.append(namespace["local"])
    assert made[0].rounds == -(-made[0].steps // 8)
    assert namespace["batches"].consumed.examples >= 4096
    assert (made[1].rounds, made[1].steps) == (30, 480)


def test_every_period_outer_optimizer_and_way_to_measure_is_in_a_table() -> None:
    cells = " ".join(line for line in TEXT.splitlines() if line.startswith("|"))
    names = [*get_args(local_sgd.Spread), *get_args(local_sgd.MeasuredStep)]
    assert not [name for name in names if f'`"{name}"`' not in cells]
    kinds = [local_sgd.Fixed, local_sgd.Table, local_sgd.Quadratic, local_sgd.Average, local_sgd.Nesterov]
    assert not [kind for kind in (*kinds, local_sgd.SlowMo) if f"{kind.__name__}(" not in cells]
    for word in (*get_args(local_sgd.Compression)[1:], *get_args(local_sgd.AverageWeights)[:1]):
        assert f'"{word}"' in TEXT
