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
    (block,) = python_blocks()
    namespace: dict[str, Any] = {}
    exec(compile(block, str(README), "exec"), namespace)
    assert namespace["batches"].consumed.examples == 2 * 4096
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_the_readme_keeps_its_promise_of_five_lines() -> None:
    marked = [line for line in python_blocks()[0].splitlines() if "# <-" in line]
    assert len(marked) == 5


def test_the_readme_is_two_screens_long() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 95


def test_its_table_names_results_that_exist() -> None:
    table = [line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    names = [name for line in table for name in re.findall(r"`(\w+\.md)`", line.rsplit("|", 2)[1])]
    assert len(names) >= 5
    for name in names:
        assert (README.parent / "benchmarks" / "results" / name).exists(), name
