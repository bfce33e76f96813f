"""The code of the README runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parents[2] / "README.md"


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks()
    assert len(blocks) >= 2
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    assert namespace["batches"].consumed.examples >= 40_000
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_the_readme_keeps_its_promise_of_five_lines() -> None:
    marked = [line for line in python_blocks()[0].splitlines() if "# <-" in line]
    assert len(marked) == 5


def test_what_the_readme_points_to_exists() -> None:
    text = README.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:configs|benchmarks|docs)/[\w./-]+)`|\]\(((?!http)[\w./-]+)\)", text):
        assert (README.parent / (path[0] or path[1])).exists(), path
