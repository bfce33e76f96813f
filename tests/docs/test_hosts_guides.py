"""The code of the pages about hosts, and about measuring only, runs as it stands, block after block."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hosts import environment_kept

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {"accelerate.md": "accelerate", "lightning.md": "lightning", "monitor.md": "torch", "transformers.md": "trl"}

environment = pytest.fixture(autouse=True)(environment_kept)


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    yield
    if importlib.util.find_spec("accelerate") is not None:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.mark.slow
@pytest.mark.parametrize(("page", "host"), PAGES.items())
@pytest.mark.filterwarnings("ignore")  # the hosts warn of much that is no concern of ours
def test_the_python_of_a_page_runs(page: str, host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec(host) is None:
        pytest.skip(f"needs {host} (pip install {host})")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks
    namespace: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        for block in blocks:
            exec(compile(block, f"docs/{page}", "exec"), namespace)
