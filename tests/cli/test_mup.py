"""``adabatch mup``: its tables, pictures and exit status, for the models it brings and for a user's own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from adabatch.cli.main import main
from adabatch.optim import mup
from adabatch.recipes.widths import digits, mlp

pytest.importorskip("sklearn", reason="the digits need scikit-learn (extra cli)")

OWN = """
import torch

def make(width):
    return torch.nn.Sequential(torch.nn.Linear(5, width), torch.nn.Tanh(), torch.nn.Linear(width, 1))

def batches(seed):
    generator = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(16, 5, generator=generator)
        yield x, x.sum(1, keepdim=True)

def wrong(model, plan, lr, damping):
    return torch.optim.Adam(model.parameters(), lr=lr)

def right(model, plan, lr, damping):
    return torch.optim.AdamW(plan.groups(model, "adamw", lr=lr))
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments that name a module of the user's."""
    (tmp_path / "own_model.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return ["--model=own_model.make", "--data=own_model.batches", "--loss=torch.nn.functional.mse_loss"]


def rows(text: str, first: str) -> list[list[str]]:
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.strip().startswith(first)]


@pytest.mark.parametrize("method", ["adamw", "kfac"])
def test_check_passes_where_the_control_fails(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made" / "check.png"
    # Three seeds of narrow nets are noisier than the default tolerance, and the control far beyond this one.
    options = ["--widths", "128", "512", "--seeds", "3", "--tolerance", "0.25", "--out", str(out)]
    assert main(["mup", "check", "--method", method, *options]) == 0
    text = capsys.readouterr().out
    ours, control = rows(text, "layers.1.weight")
    assert len(ours) == len(control) == 6
    assert ours[-1] == "passed"
    assert "FAILED" in {cells[-1] for layer in "012" for cells in rows(text, f"layers.{layer}.weight")[1:]}
    assert "width plan: passed" in text
    assert out.read_bytes().startswith(b"\x89PNG")


def test_check_of_a_users_own_method_fails_where_it_ignores_the_plan(
    own: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    widths = ["--widths", "256", "1024", "--out", "own.png"]
    assert main(["mup", "check", *own, "--method=own_model.right", "--lr=0.01", *widths]) == 0
    assert main(["mup", "check", *own, "--method=own_model.wrong", "--lr=0.01", *widths]) == 1
    assert "width plan: FAILED" in capsys.readouterr().out


def test_sweep_marks_the_best_of_every_width(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sweep.png"
    rates = ["--lrs", "0.0005", "0.008", "0.128", "--dampings", "1e-8", "1e-2", "--control", "true"]
    sizes = ["--widths", "64", "128", "--steps", "10", "--out", str(out)]
    assert main(["mup", "sweep", *rates, *sizes]) == 0
    text = capsys.readouterr().out
    assert text.count("Loss by") == 4
    table = [cells for rate in ("0.0005", "0.008", "0.128") for cells in rows(text, rate)[:1]]
    assert [sum(cell.endswith("*") for cell in column) for column in zip(*table, strict=True)] == [0, 1, 1]
    for column in (1, 2):
        losses = [float(cells[column].rstrip("*")) for cells in table]
        assert table[losses.index(min(losses))][column].endswith("*")
    assert out.read_bytes().startswith(b"\x89PNG")


def test_plan_prints_and_writes_what_the_library_makes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    assert main(["mup", "plan", "--width", "256", "--out", str(out)]) == 0
    with torch.device("meta"):
        plan = mup.plan(mlp(256), mlp(64))
    assert mup.Plan.from_json(out.read_text()) == plan
    assert str(plan) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "--method=newton"], "method must be one of sgd"),
        (["check", "--model=nowhere.make"], "'nowhere.make' cannot be imported"),
        (["check", "--model=adabatch.recipes.widths.BATCH"], "is not a function or class, but int"),
        (["check", "--widths", "64"], "two or more different"),
        (["check", "--method=sgd", "--damping=0.1", "--widths", "64", "128"], "sgd has no damping"),
        (["plan", "--width=64"], "same width as the model"),
        (["sweep", "--lrs", "0.1", "--steps", "0"], "steps must be 1 or more"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["mup", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_the_digits_come_centred_in_full_batches_forever() -> None:
    source = digits(0)
    epochs = [next(source) for _ in range(44)]  # 22 batches of 64 in 1,437 images
    assert all(x.shape == (64, 64) and y.shape == (64,) for x, y in epochs)
    assert not torch.equal(epochs[0][0], epochs[22][0])
    assert abs(torch.cat([x for x, _ in epochs]).mean()) < 0.01
    assert torch.equal(next(digits(0))[0], epochs[0][0])
