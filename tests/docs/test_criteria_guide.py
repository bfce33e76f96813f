"""The code of docs/criteria.md runs as it stands, and its tables are those of the code."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

import adabatch
from adabatch.batch import Reason, efficiency

TEXT = (Path(__file__).parents[2] / "docs" / "criteria.md").read_text(encoding="utf-8")


def rows_of(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its own head."""
    section = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in section.splitlines() if "|" in line
    ][2:]


def test_the_python_of_the_guide_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(blocks) == 3
    namespace: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        for block in blocks:
            exec(compile(block, "docs/criteria.md", "exec"), namespace)
    batches = namespace["batches"]
    x = torch.randn(256, 20)
    data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())  # with a signal, or there is no noise scale
    for step in batches.steps(adabatch.GlobalOrder(data)):
        for x, y in step:
            step.backward(torch.nn.functional.cross_entropy(namespace["model"](x), y))
        namespace["optimizer"].step()
        namespace["optimizer"].zero_grad()
    assert batches.noise_scale > 0


def test_the_table_of_the_norm_test_is_its_formula() -> None:
    rows = rows_of("If you think in tolerances: the norm test")
    assert len(rows) == 5
    for eta, batch, worth, _ in rows:
        rest = (1 - float(eta) ** 2) / float(eta) ** 2
        assert float(batch.removesuffix(" B")) == pytest.approx(rest, rel=0.02)
        assert float(worth.removesuffix(" %")) / 100 == pytest.approx(efficiency(rest, 1.0), abs=0.005)


def test_every_criterion_of_the_package_has_a_row() -> None:
    first = " ".join(row[0] for row in rows_of("All criteria"))
    named = set(re.findall(r"`(\w+)", first))
    every = {
        name
        for module in (adabatch, adabatch.batch)
        for name in module.__all__
        if isinstance(getattr(module, name), type) and hasattr(getattr(module, name), "wanted")
    }
    assert named == every - {"Criterion", "Schedule"}, "but for the bases of all"


def test_the_defaults_of_the_control_are_those_of_the_code() -> None:
    rows = rows_of("Control")
    defaults = {field.name: field.default for field in fields(adabatch.Control)}
    told: dict[str, str] = {}
    for names, values, _ in rows:
        split = re.sub(r" \(.*?\)", "", values).split(", ")
        told |= dict(zip(re.findall(r"`(\w+)`", names), split, strict=True))
    assert told == {name: str(default) for name, default in defaults.items()}


def test_every_reason_is_explained() -> None:
    rows = rows_of("Why the batch did what it did")
    assert {reason for row in rows for reason in row[0].split(", ")} == {str(reason) for reason in Reason}
