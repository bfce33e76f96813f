"""The code of docs/how_it_works.md runs as it stands, and each of its formulas becomes MathML."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

GUIDE = Path(__file__).parents[2] / "docs" / "how_it_works.md"
TEXT = GUIDE.read_text(encoding="utf-8")


def test_the_python_of_the_guide_runs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    with torch.random.fork_rng(devices=[]):
        exec(compile(block, str(GUIDE), "exec"), {})


def test_each_formula_becomes_mathml() -> None:
    converter = pytest.importorskip("latex2mathml.converter", reason="formulas need the extra docs")
    formulas = re.findall(r"```math\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(formulas) == 8
    for formula in formulas:
        shown = converter.convert(formula.strip(), display="block")
        assert shown.startswith("<math"), formula
        assert "\\" not in shown, formula  # a command that is not known stays as it is
