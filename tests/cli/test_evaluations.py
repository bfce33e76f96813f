"""Evaluations during ``adabatch train``: when they are due, where their numbers go, and that the run is the same."""

from __future__ import annotations

import io
import json
import logging
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hosts import rank_variables
from support.ports import free_port
from support.ranks import run_ranks
from torch import Tensor, nn
from torch.utils.data import Dataset

from adabatch.cli.main import main

DIGITS = "adabatch.recipes.digits.Digits"
CONFIG: dict[str, Any] = {
    "model": {"class_path": f"{__name__}.Dropped"},
    "loss": {"class_path": "torch.nn.CrossEntropyLoss"},
    "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05}},
    "train_data": {"class_path": DIGITS, "init_args": {"split": "train"}},
    "test_data": {"class_path": DIGITS, "init_args": {"split": "test"}},
    "criterion": {"class_path": "adabatch.NormTest", "init_args": {"eta": 0.7}},
    "micro_batch_size": 8,
    "limits": {"min": 16, "max": 64},
    "total": {"count": 640, "unit": "examples"},
    "hang_timeout": None,
}


class Dropped(nn.Module):
    """A model whose gradient depends on the global random numbers, with a part that the user has frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Dropout(0.9).eval()
        self.dropped = nn.Dropout(0.3)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        assert not self.frozen.training
        return self.head(self.dropped(self.frozen(x.flatten(1))))  # type: ignore[no-any-return]


class Nothing(Dataset[Any]):
    """A data set without examples."""

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> Any:
        raise IndexError(index)


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(text) for text in (folder / "journal.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "run"} for line in found]


def test_a_run_with_evaluations_is_the_run_without(config: Any, tmp_path: Path, capsys: Any) -> None:
    assert main(["train", "--config", config(evaluate_every={"count": 200, "unit": "examples"})]) == 0
    said = capsys.readouterr().out
    assert main(["train", "--config", config(out=str(tmp_path / "plain"))]) == 0
    found, plain = lines(tmp_path / "run"), lines(tmp_path / "plain")
    evaluations = [line for line in found if "evaluation" in line]
    assert [line for line in found if "evaluation" not in line] == plain[:-1]
    assert [line["examples"] // 200 for line in evaluations[:-1]] == [1, 2, 3]
    assert evaluations[-1] == plain[-1]  # at the end there is one anyway
    assert set(plain[-1]["evaluation"]) == {"loss", "accuracy"}
    assert f"evaluated at {evaluations[0]['examples']:,} examples: loss " in said


def test_a_resumed_run_keeps_its_evaluations(config: Any, tmp_path: Path, caplog: Any) -> None:
    every = {"evaluate_every": {"count": 10, "unit": "steps"}, "checkpoint": {"every": {"count": 15, "unit": "steps"}}}
    path = config(total={"count": 40, "unit": "steps"}, **every)
    assert main(["train", "--config", path]) == 0
    whole = lines(tmp_path / "run")
    # As if it had been killed after its second checkpoint, of step 30.
    (newest,) = (tmp_path / "run" / "checkpoints").glob("*-step-40")
    newest.rename(tmp_path / "taken")
    with caplog.at_level(logging.WARNING, "adabatch"):
        assert main(["train", "--config", path]) == 0
    assert lines(tmp_path / "run") == whole
    assert [line["step"] for line in whole if "evaluation" in line] == [10, 20, 30, 40]
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"evaluate_every": {"count": 0, "unit": "steps"}}, "evaluate_every must be at least 1 steps"),
        ({"evaluate_every": {"count": 9, "unit": "steps"}, "test_data": None}, "evaluate_every needs test_data"),
        ({"evaluate_every": {"count": 9, "unit": "tokens"}}, "this run does not count tokens"),
        ({"test_data": {"class_path": f"{__name__}.Nothing"}}, "test_data must hold at least 1 example"),
    ],
    ids=["zero", "no data", "unit", "empty data"],
)
def test_what_cannot_be_is_said(change: dict[str, Any], said: str, config: Any, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main(["train", "--config", config(**change)]))
    assert ended.value.code not in (0, None)
    assert said in capsys.readouterr().err
    assert not lines(tmp_path / "run") if (tmp_path / "run" / "journal.jsonl").exists() else True


def trained(rank: int, port: int, config: str) -> tuple[int, str]:
    """`adabatch train` on a rank that evaluates after another number of steps than the other rank."""
    torch.set_num_threads(1)
    rank_variables(rank, 2, port)
    every = json.dumps({"count": 3 + rank, "unit": "steps"})
    with redirect_stderr(io.StringIO()) as said:
        status = main(["train", "--config", config, "--engine=ddp", f"--evaluate_every={every}"])
    return status, said.getvalue()


@pytest.mark.distributed
def test_ranks_that_would_evaluate_at_other_times_are_told_before_the_first_step(config: Any, tmp_path: Path) -> None:
    for status, said in run_ranks(trained, 2, tmp_path, free_port(), config(), connect=False, timeout=120):
        assert status == 2
        assert "different settings: evaluate_every" in said
        assert "3" in said
        assert "4" in said
