"""docs/mup.md: its Python and its commands run as they stand, print what it shows, and its tables leave nothing out."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from adabatch.cli.main import main
from adabatch.optim import mup
from adabatch.optim.mup.entry import Dim, Role
from adabatch.optim.mup.laws import LAWS

# not importorskip, which imports it: seconds in each process that collects the tests, for the few that run them
pytestmark = pytest.mark.skipif(find_spec("sklearn") is None, reason="the digits need scikit-learn (extra cli)")

GUIDE = Path(__file__).parents[2] / "docs" / "mup.md"
TEXT = GUIDE.read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_the_python_of_the_guide_runs() -> None:
    namespace: dict[str, Any] = {}
    assert len(blocks("python")) == 4
    with torch.random.fork_rng(devices=[]):
        for block in blocks("python"):
            exec(compile(block, str(GUIDE), "exec"), namespace)


@pytest.mark.slow
def test_the_commands_of_the_guide_run_and_print_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shown, commands = "", 0
    for line in (line for block in blocks("console") for line in block.splitlines()):
        if line.startswith("$ "):
            program, *arguments = shlex.split(line[2:])
            assert program == "adabatch"
            assert main(arguments) in (0, 1), line  # narrow nets and one seed may fail the check
            shown = capsys.readouterr().out
            commands += 1
        else:
            assert line.split() in [other.split() for other in shown.splitlines()], line
    assert commands == 3
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("check.png", "sweep.png"))


def test_every_method_role_and_dimension_is_there() -> None:
    cells = " ".join(line for line in TEXT.splitlines() if line.startswith("|"))
    assert not [name for name in (*LAWS, *get_args(Role)) if f'"{name}"' not in cells]
    assert not [dim for dim in get_args(Dim) if f"`{dim}`" not in TEXT]


def test_what_the_guide_names_of_the_module_exists() -> None:
    named = set(re.findall(r"\bmup\.(\w+)\b", TEXT.replace("optim.mup", "").replace("mup.md", "")))
    assert len(named) > 8
    assert not [name for name in named if not hasattr(mup, name)]
