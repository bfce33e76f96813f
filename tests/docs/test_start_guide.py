"""The model of docs/start.md is one that `adabatch init` takes, and says of it what the guide shows."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from adabatch.cli.main import main

pytest.importorskip("jsonargparse", reason="configs need the extra cli")

GUIDE = Path(__file__).parents[2] / "docs" / "start.md"
TEXT = GUIDE.read_text(encoding="utf-8")


def test_the_model_of_the_guide_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    (console,) = re.findall(r"```console\n(.*?)```", TEXT, flags=re.DOTALL)
    (tmp_path / "my_model.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with torch.random.fork_rng(devices=[]):
        assert main(["init", "my_model.py"]) == 0
    del sys.modules["my_model"]
    command, *shown = console.splitlines()
    assert command == "$ adabatch init my_model.py"
    said = capsys.readouterr().out.splitlines()
    changing = r"loss +[\d.]+|in [\d.]+ s"  # the weights are drawn, and time passes
    assert [re.sub(changing, "", line) for line in said] == [re.sub(changing, "", line) for line in shown]
