"""docs/schedules.md: its Python and its commands run as they stand, and print what it shows."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from adabatch.cli.main import main
from adabatch.lr.shapes import FACTORIES

# not importorskip, which imports it: seconds in each process that collects the tests, for the few that run them
pytestmark = pytest.mark.skipif(find_spec("sklearn") is None, reason="the digits need scikit-learn (extra cli)")

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "schedules.md"
TEXT = GUIDE.read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def test_the_python_of_the_guide_runs() -> None:
    namespace: dict[str, Any] = {}
    assert len(blocks("python")) == 5
    for block in blocks("python"):
        exec(compile(block, str(GUIDE), "exec"), namespace)


@pytest.mark.slow
def test_the_commands_of_the_guide_run_and_print_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    commands = 0
    for line in (line for block in blocks("console") for line in block.splitlines()):
        if line.startswith("$ "):
            program, *arguments = shlex.split(line[2:])
            assert program == "adabatch"
            assert main(arguments) == 0, line
            shown = capsys.readouterr().out
            commands += 1
        elif "──" not in line:
            assert cells(line) in [cells(other) for other in shown.splitlines()], line
    assert commands == 7
    for written in ("schedules.png", "runs/first/refined.png", "norms.png", "transfer.png", "runs/first/extend.png"):
        assert (tmp_path / written).stat().st_size > 10_000


def cells(line: str) -> list[str]:
    """A row of a table, less the width of its columns."""
    return re.split(r"\s{2,}", line.strip())


def test_every_shape_has_its_formula() -> None:
    table = " ".join(line for line in TEXT.splitlines() if line.startswith("| `"))
    assert not [name for name in FACTORIES if f"`{name}" not in table]


def test_what_the_guide_points_to_exists() -> None:
    for path in re.findall(r"\]\(((?!http)[\w./-]+)\)", TEXT):
        assert (GUIDE.parent / path).exists(), path
    for path in re.findall(r"`((?:configs|benchmarks|docs)/[\w./-]+)`", TEXT):
        assert (ROOT / path).exists(), path
