"""The code of docs/port_your_loop.md runs as it stands: its first block, and each other one after it alone."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

TEXT = (Path(__file__).parents[2] / "docs" / "port_your_loop.md").read_text(encoding="utf-8")
FIRST, *OTHERS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
HOSTS = ("accelerate", "lightning")


@pytest.fixture(autouse=True)
def environment_as_it_was() -> Iterator[None]:
    """Hosts leave variables behind."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


def test_each_way_to_come_from_has_code() -> None:
    assert len(OTHERS) == 8


@pytest.mark.parametrize(
    "block",
    # importing Lightning alone takes seconds
    [pytest.param(block, marks=[pytest.mark.slow] if "import lightning" in block else []) for block in OTHERS],
    ids=[block.split("\n", 1)[0][:40] for block in OTHERS],
)
@pytest.mark.filterwarnings("ignore")  # the hosts warn of much that is no concern of ours
def test_the_python_of_the_guide_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for host in HOSTS:
        if re.search(rf"^(import|from) {host}", block, flags=re.MULTILINE) and importlib.util.find_spec(host) is None:
            pytest.skip(f"needs {host} (pip install {host})")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        for part in (FIRST, block):
            exec(compile(part, "docs/port_your_loop.md", "exec"), namespace)
    if "accelerator" in namespace:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
