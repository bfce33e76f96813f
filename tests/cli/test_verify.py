"""``adabatch verify`` as a person uses it: a table, a status, and no file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.jobs import Attempt

from adabatch.cli.main import main
from adabatch.runtime.probes.micro_batch import MicroBatchProbe

pytest.importorskip("sklearn", reason="the digits need scikit-learn (extra cli)")

CHECKS = ("drift", "probe", "constant policy", "resume", "cost")

CONFIG: dict[str, Any] = {
    "format": 1,
    "model": {"class_path": "adabatch.recipes.models.MLP"},
    "loss": {"class_path": "torch.nn.CrossEntropyLoss"},
    "optimizer": {"class_path": "adabatch.optim.AdaGradNorm", "init_args": {"lr": 1.0}},
    "train_data": {"class_path": "adabatch.recipes.digits.Digits", "init_args": {"split": "train"}},
    "criterion": {"class_path": "adabatch.NormTest", "init_args": {"eta": 0.5}},
    "micro_batch_size": 8,
    "max_micro_batch_size": 128,
    "limits": {"min": 16, "max": 256},
    "lr_rule": "gain",
    "total": {"count": 3000, "unit": "examples"},
}

DRIFTING = '''
import os
import torch
from adabatch.recipes.models import MLP

class Drifting(MLP):
    """Rank 1 changes a weight after the ranks were made equal."""

    def forward(self, x):
        if os.environ["RANK"] == "1":
            with torch.no_grad():
                next(self.parameters()).view(-1)[0] += 1e-4
        return super().forward(x)
'''


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_shows_a_table_and_writes_nothing(config: Any, tmp_path: Path, capsys: Any) -> None:
    path = config()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "journal.jsonl").write_text("of another run\n")
    before = files(tmp_path)
    assert main(["verify", "--config", path, "--steps=4"]) == 0
    assert files(tmp_path) == before
    out = capsys.readouterr().out
    table = out[out.index("Verified") :]
    for name in CHECKS:
        assert f"{name}: passed: " in out
        assert f"\n {name} " in table.replace("│", " ")
    assert "FAILED" not in out
    assert "reported" in table


def test_a_failed_check_is_status_1(config: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = MicroBatchProbe.moments

    def wrong(self: MicroBatchProbe, totals: list[float]) -> Any:
        found = right(self, totals)
        return found._replace(part_sq=found.part_sq * 1.01)

    monkeypatch.setattr(MicroBatchProbe, "moments", wrong)
    assert main(["verify", "--config", config(), "--steps=4"]) == 1
    out = capsys.readouterr().out
    assert "probe: FAILED: part_sq is off by 0.0099" in out
    assert out.count("FAILED") == 2  # the line and the table
    assert "cost: passed" in out  # the others are made all the same


def test_a_cost_above_the_largest_is_status_1(config: Any, capsys: Any) -> None:
    assert main(["verify", "--config", config(), "--steps=4", "--max_cost=0.01"]) == 1
    assert "cost: FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "flags", "words"),
    [
        ({"micro_batch_size": 400, "max_micro_batch_size": None, "limits": {"min": 800, "max": 1200}}, [],
         ["steps of 1600 examples", "1437"]),
        ({"limits": {"min": 256, "max": 16}}, [], ["crossed"]),
        ({"micro_batch_size": 32}, [], ["limits.min=16"]),
        ({}, ["--steps=2"], ["at least 4 steps, got 2"]),
        ({}, ["--max_cost=-1"], ["max_cost must be positive"]),
        ({}, ["--steps=many"], ["many"]),
    ],
)  # fmt: skip
def test_a_mistake_is_status_2(config: Any, capsys: Any, changes: Any, flags: list[str], words: list[str]) -> None:
    try:
        status: Any = main(["verify", "--config", config(**changes), *flags])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    for word in words:
        assert word in error


@pytest.mark.distributed
def test_two_processes_pass(config: Any, tmp_path: Path) -> None:
    codes = Attempt(tmp_path, ["verify", "--config", config(), "--steps=4"], 2).join()
    said = (tmp_path / "output").read_text()
    assert codes == [0, 0], said
    assert "2 ranks equal to the bit after 7 steps" in said
    assert said.count("Verified") == 1  # the first rank alone speaks
    assert not (tmp_path / "run").exists()


@pytest.mark.distributed
def test_a_rank_that_drifts_ends_both_processes(config: Any, tmp_path: Path) -> None:
    (tmp_path / "drifting.py").write_text(DRIFTING)
    job = config(model={"class_path": "drifting.Drifting"})
    codes = Attempt(tmp_path, ["verify", "--config", job, "--steps=4"], 2, cwd=tmp_path).join()
    said = (tmp_path / "output").read_text()
    assert codes == [1, 1], said
    assert "drift: FAILED: rank 1 drifted from the others in 7 steps" in said
    assert "Verified" in said  # to the end
    assert not (tmp_path / "run").exists()
