"""``adabatch compare --tune``: the search, the split, and the command with both."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from adabatch.cli import tune
from adabatch.cli.job import Job
from adabatch.cli.main import main
from adabatch.cli.making import job_of
from adabatch.cli.optimizers import is_second_order, optimizer_of
from adabatch.optim import Shampoo

pytest.importorskip("sklearn", reason="the digits need scikit-learn (extra cli)")

CONFIG: dict[str, Any] = {
    "format": 1,
    "model": {"class_path": "adabatch.recipes.models.MLP"},
    "loss": {"class_path": "torch.nn.CrossEntropyLoss"},
    "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
    "train_data": {"class_path": "adabatch.recipes.digits.Digits", "init_args": {"split": "train"}},
    "test_data": {"class_path": "adabatch.recipes.digits.Digits", "init_args": {"split": "test"}},
    "criterion": {"class_path": "adabatch.NormTest", "init_args": {"eta": 0.7}},
    "micro_batch_size": 8,
    "limits": {"min": 16, "max": 64},
    "lr_rule": "gain",
    "total": {"count": 500, "unit": "examples"},
}
SHAMPOO = {"class_path": "adabatch.optim.Shampoo", "init_args": {"lr": 0.1}}


@pytest.mark.parametrize("best", [-5, -1, 0, 1, 4])
def test_the_grid_grows_until_the_best_lies_inside(best: int) -> None:
    asked: list[int] = []

    def loss(exponent: int) -> float:
        asked.append(exponent)
        return float((exponent - best) ** 2)

    found = tune.search(loss)
    assert (found.exponent, found.at_edge) == (best, False)
    assert {best - 1, best, best + 1} <= found.losses.keys()
    assert len(asked) == len(set(asked)) == len(found.losses)


def test_learning_rates_that_diverge_send_the_search_down() -> None:
    found = tune.search(lambda exponent: math.nan if exponent > -3 else float((exponent + 5) ** 2))
    assert found.exponent == -5
    assert found.losses[0] == math.inf


def test_an_edge_is_told_and_nothing_that_trains_is_an_error() -> None:
    found = tune.search(lambda exponent: -float(exponent), furthest=3)
    assert (found.exponent, found.at_edge) == (3, True)
    with pytest.raises(ValueError, match=r"all learning rates diverged, down to 2\^-3 times"):
        tune.search(lambda exponent: math.inf, furthest=3)


def job(config: Any) -> Job:
    return job_of(["train", "--config", config()])


def test_the_validation_split_is_kept_from_training_and_drawn_from_the_seed(config: Any) -> None:
    whole = job(config)
    final, trial = tune.split_validation(whole)
    train, validation = (set(part.indices) for part in (trial.train_data, trial.test_data))  # type: ignore[union-attr]
    assert set(final.train_data.indices) == train  # type: ignore[attr-defined]
    assert final.test_data is whole.test_data
    assert not train & validation
    assert train | validation == set(range(len(whole.train_data)))  # type: ignore[arg-type]
    assert len(validation) == round(tune.SHARE * (len(train) + len(validation)))
    assert tune.split_validation(job(config))[1].test_data.indices == trial.test_data.indices  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="needs more examples than"):
        tune.split_validation(whole, share=1e-6)


def test_another_learning_rate_is_that_of_every_group_and_the_class_is_known(config: Any) -> None:
    model = torch.nn.Linear(3, 2)
    assert optimizer_of(tune.with_lr(job(config), -2).optimizer, model).param_groups[0]["lr"] == 0.025
    second = job_of(["train", "--config", config(optimizer=SHAMPOO)])
    made = tune.with_lr(second, 1).optimizer
    assert is_second_order(made)
    assert isinstance(optimizer_of(made, model), Shampoo)


def test_each_run_gets_its_own_learning_rate_and_trials_are_kept(
    config: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config()
    assert main(["compare", "--config", path, "--tune"]) == 0
    said = capsys.readouterr().out
    assert "LR x" in said
    assert "best of a grid of 2 by validation loss on 10% of the training data" in said
    rows = json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert [row["tuned"] for row in rows] == [True] * 3
    trials = sorted((tmp_path / "run" / "tune").glob("*/trials.json"))
    assert [each.parent.name for each in trials] == ["adaptive", "constant_16", "constant_64"]
    for row, each in zip(rows, trials, strict=True):
        losses = {int(key): value for key, value in json.loads(each.read_text())["losses"].items()}
        best = min(losses, key=lambda exponent: losses[exponent])
        assert row["lr_multiplier"] == 2.0**best
        assert min(losses) < best < max(losses), "never at an edge"
        line = json.loads(Path(row["journal"]).read_text().splitlines()[0])
        assert line["lr"]["base"] == [pytest.approx(0.1 * 2.0**best)]

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a trial was run again")

    monkeypatch.setattr(tune, "run", never)
    assert main(["compare", "--config", path, "--tune"]) == 0
    again = json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert [row["test_loss"] for row in again] == [row["test_loss"] for row in rows]
    with pytest.raises(AssertionError, match="run again"):
        main(["compare", "--config", path, "--tune", "--seed=1"])


def test_without_it_the_comparison_says_that_nothing_was_tuned(config: Any, tmp_path: Path, capsys: Any) -> None:
    assert main(["compare", "--config", config()]) == 0
    assert "nothing was tuned: all runs have the config's base LR" in capsys.readouterr().out
    rows = json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert [(row["tuned"], row["lr_multiplier"]) for row in rows] == [(False, 1.0)] * 3


def test_trials_need_a_folder(config: Any, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "--config", config(out=None), "--tune"]) == 2
    assert "give one with --out" in capsys.readouterr().err
