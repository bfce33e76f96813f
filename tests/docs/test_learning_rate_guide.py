"""The code of docs/learning_rate.md runs as it stands, and its tables leave nothing out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from adabatch import lr
from adabatch.lr.rules import LRRule, Setting
from adabatch.lr.shapes import FACTORIES
from adabatch.runtime.optimizers.scheduler import ClockKind

GUIDE = Path(__file__).parents[2] / "docs" / "learning_rate.md"
TEXT = GUIDE.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_python_of_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(blocks) >= 6
    namespace: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        for block in blocks:
            exec(compile(block, str(GUIDE), "exec"), namespace)
    assert namespace["refined"].name == "tabulated"
    assert namespace["batches"].progress.examples == 16_000
    assert namespace["schedule"].factor() == 0


def test_the_config_of_the_guide_is_read(tmp_path: Path) -> None:
    pytest.importorskip("jsonargparse", reason="configs need the extra cli")
    from adabatch.cli.parser import build_parser

    (block,) = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)
    (tmp_path / "lr.yaml").write_text(block)
    quickstart = GUIDE.parent.parent / "configs" / "quickstart.yaml"
    config = build_parser().parse_args(["train", f"--config={quickstart}", f"--config={tmp_path / 'lr.yaml'}"])
    assert (config.train.clock, config.train.total.count) == ("gain", 6_000_000)


def test_every_rule_clock_shape_and_follower_is_in_a_table() -> None:
    cells = " ".join(line for line in TEXT.splitlines() if line.startswith("|"))
    names = [f'"{name}"' for name in (*get_args(LRRule), *get_args(Setting))]
    names += [f"{name}(" for name in FACTORIES]
    names += [f'clock="{name}"' for name in get_args(ClockKind) if name != "total"]
    assert not [name for name in names if name not in cells]


def test_what_the_guide_names_of_the_module_exists() -> None:
    named = set(re.findall(r"\blr\.(\w+)\b", TEXT))
    assert not [name for name in named if not hasattr(lr, name) and name != "rules"]
