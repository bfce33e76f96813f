"""What a resumed run makes of other settings: the rows of the table in docs/checkpoints.md, one test for each."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from support.loops import lines, loss_of, network, regression, weights
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

import adabatch
from adabatch import AdaptiveBatch, GlobalOrder, Limits, LocalSGD, NormTest, ProgressLR, lr
from adabatch.local_sgd import Nesterov

TOTAL = adabatch.examples(2000)


class Run:
    """A run of AdamW with a schedule, or with what is given in its place."""

    def __init__(
        self,
        folder: Path,
        *,
        rate: float = 0.01,
        schedule: bool | str = True,
        model: nn.Module | None = None,
        seed: int = 5,
        criterion: Any = None,
        limits: Limits | None = None,
        micro: int = 4,
        reference: int | None = None,
        optimizer: Any = None,
        total: adabatch.batch.Duration = TOTAL,
        **options: Any,
    ) -> None:
        self.model = model or network()
        parameters = self.model.parameters()
        self.optimizer: Optimizer = optimizer or AdamW(parameters, lr=rate, **options)
        self.batches = AdaptiveBatch(
            self.model,
            self.optimizer,
            criterion or NormTest(eta=0.3),
            micro_batch_size=micro,
            limits=limits or Limits(min=8, max=64),
            lr_rule="sqrt",
            reference_batch_size=reference,
            journal=folder / "journal.jsonl",
        )
        self.schedule: Any = None
        if schedule is True:
            self.schedule = ProgressLR(self.optimizer, lr.cosine(), self.batches, total=total)
        elif schedule == "torch":
            self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=100)
        self.order = GlobalOrder(regression(300), seed=seed)

    def parts(self) -> dict[str, Any]:
        return {
            "model": self.model, "optimizer": self.optimizer, "batches": self.batches, "schedule": self.schedule,
            "order": self.order,
        }  # fmt: skip

    def train(self, number: int) -> None:
        for step in self.batches.steps(self.order, until=adabatch.steps(number)):
            for batch in step:
                step.backward(loss_of(self.model, batch))
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.schedule is not None:
                self.schedule.step()

    @property
    def group(self) -> dict[str, Any]:
        return self.optimizer.param_groups[0]


def saved(folder: Path, **options: Any) -> Run:
    run = Run(folder, **options)
    run.train(6)
    adabatch.save(folder / "saved", **run.parts())
    return run


def load(run: Run, folder: Path) -> adabatch.checkpointing.Loaded:
    loaded = adabatch.load(folder / "saved", **run.parts())
    assert loaded is not None
    return loaded


def said(loaded: adabatch.checkpointing.Loaded) -> list[str]:
    return [str(each) for each in (*loaded.differences, *loaded.kept)]


def test_nothing_is_said_of_a_run_that_is_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = saved(tmp_path)
    second = Run(tmp_path)
    assert said(load(second, tmp_path)) == []
    assert second.group["lr"] == first.group["lr"] != 0.01
    assert not caplog.records


def test_a_learning_rate_is_taken_over(tmp_path: Path) -> None:
    first = saved(tmp_path)
    shape = first.group["lr"] / 0.01
    second = Run(tmp_path, rate=0.003)
    assert said(load(second, tmp_path)) == ["optimizer.lr was 0.01 when the checkpoint was saved, and is 0.003 now"]
    assert second.group["lr"] == pytest.approx(0.003 * shape, rel=1e-12)
    second.train(8)
    last = lines(tmp_path / "journal.jsonl")[-1]["lr"]
    assert last["base"] == [0.003]
    assert last["applied"][0] == pytest.approx(0.003 * last["shape"][0] * last["factor"], rel=1e-12)
    adabatch.save(tmp_path / "saved", **second.parts())
    third = Run(tmp_path, rate=0.003)
    assert said(load(third, tmp_path)) == []
    assert third.schedule.base_lrs == [0.003]


def test_a_learning_rate_that_was_changed_under_way_stands_where_the_command_is_the_same(tmp_path: Path) -> None:
    first = saved(tmp_path)
    first.schedule.set_base_lrs([0.002])
    adabatch.save(tmp_path / "saved", **first.parts())
    second = Run(tmp_path)
    assert said(load(second, tmp_path)) == []
    assert second.schedule.base_lrs == [0.002]
    assert second.group["lr"] == first.group["lr"]
    with pytest.raises(ValueError, match=r"must be 1 finite rate\(s\), one for each group, got \[0\.1, 0\.2\]"):
        first.schedule.set_base_lrs([0.1, 0.2])
    with pytest.raises(ValueError, match="finite"):
        first.schedule.set_base_lrs([float("nan")])


def test_a_checkpoint_from_before_this_was_recorded_is_taken_by_its_base_rates(tmp_path: Path) -> None:
    first = Run(tmp_path)
    state = first.schedule.state_dict
    first.schedule.state_dict = lambda: {key: value for key, value in state().items() if key != "built_lrs"}
    adabatch.save(tmp_path / "saved", **first.parts())
    assert said(load(Run(tmp_path), tmp_path)) == []
    second = Run(tmp_path, rate=0.003)
    load(second, tmp_path)
    assert second.schedule.base_lrs == [0.003]


def test_a_learning_rate_under_another_scheduler_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, schedule="torch")
    second = Run(tmp_path, schedule="torch", rate=0.003)
    before = weights(second.model)
    with pytest.raises(ValueError, match=r"optimizer\.lr=0\.01, this run was built with 0\.003, and CosineAnnealingLR"):
        load(second, tmp_path)
    assert torch.equal(weights(second.model), before)
    assert said(load(Run(tmp_path, schedule="torch"), tmp_path)) == []


def test_a_learning_rate_without_a_schedule_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path, schedule=False)
    second = Run(tmp_path, schedule=False, rate=0.003)
    with caplog.at_level(logging.WARNING, logger="adabatch"):
        loaded = load(second, tmp_path)
    expected = "optimizer.lr stays 0.01, as it was saved, and the 0.003 of this run is not used"
    assert len(loaded.kept) == 1
    assert str(loaded.kept[0]).startswith(expected)
    assert expected in caplog.text
    assert second.group["lr"] == 0.01


def test_weight_decay_is_taken_over(tmp_path: Path) -> None:
    saved(tmp_path, weight_decay=0.1)
    second = Run(tmp_path, weight_decay=0.3)
    assert said(load(second, tmp_path)) == [
        "optimizer.weight_decay was 0.1 when the checkpoint was saved, and is 0.3 now"
    ]
    assert second.group["weight_decay"] == 0.3


def test_settings_are_those_of_each_group(tmp_path: Path) -> None:
    def groups(*rates: float) -> Run:
        model = network()
        made = [{"params": list(layer.parameters()), "lr": rate} for layer, rate in zip(model[::2], rates, strict=True)]
        return Run(tmp_path, model=model, optimizer=AdamW(made))

    first = groups(0.01, 0.02)
    first.train(3)
    adabatch.save(tmp_path / "saved", **first.parts())
    second = groups(0.01, 0.05)
    assert said(load(second, tmp_path)) == [
        "optimizer.param_groups[1].lr was 0.02 when the checkpoint was saved, and is 0.05 now"
    ]
    assert second.schedule.base_lrs == [0.01, 0.05]


def test_other_settings_of_the_optimizer_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, betas=(0.9, 0.99), eps=1e-8)
    second = Run(tmp_path, betas=(0.8, 0.99), eps=1e-6)
    loaded = load(second, tmp_path)
    assert [(kept.name, kept.saved, kept.given) for kept in loaded.kept] == [
        ("optimizer.betas", [0.9, 0.99], [0.8, 0.99]),
        ("optimizer.eps", 1e-8, 1e-6),
    ]
    assert (second.group["betas"], second.group["eps"]) == ((0.9, 0.99), 1e-8)


class CountingSGD(SGD):
    """Keeps a number of its own among the settings of its groups, as schedule-free optimizers do."""

    def __init__(self, parameters: Any, *, lr: float) -> None:
        super().__init__(parameters, lr=lr)
        for group in self.param_groups:
            group["k"] = 0


def test_what_an_optimizer_keeps_in_its_groups_is_no_setting(tmp_path: Path) -> None:
    model = network()
    first = Run(tmp_path, model=model, optimizer=CountingSGD(model.parameters(), lr=0.01))
    first.group["k"] = 7
    adabatch.save(tmp_path / "saved", **first.parts())
    model = network()
    second = Run(tmp_path, model=model, optimizer=CountingSGD(model.parameters(), lr=0.01))
    assert said(load(second, tmp_path)) == []
    assert second.group["k"] == 7


def test_a_given_reference_batch_size_is_refused_and_one_that_was_not_given_is_kept(tmp_path: Path) -> None:
    saved(tmp_path, reference=16)
    second = Run(tmp_path, reference=32)
    before = weights(second.model)
    with pytest.raises(ValueError, match="saved with reference_batch_size=16, but this one was built with 32"):
        load(second, tmp_path)
    assert torch.equal(weights(second.model), before)
    third = Run(tmp_path)
    load(third, tmp_path)
    assert third.batches.state_dict()["reference_batch_size"] == 16


def test_a_seed_is_kept(tmp_path: Path) -> None:
    first = saved(tmp_path)
    second = Run(tmp_path, seed=6)
    loaded = load(second, tmp_path)
    assert [kept[:3] for kept in loaded.kept] == [("data.seed", 5, 6)]
    assert second.order.state_dict() == first.order.state_dict()


def test_limits_criterion_and_micro_batch_are_taken_over(tmp_path: Path) -> None:
    saved(tmp_path)
    second = Run(tmp_path, criterion=adabatch.Constant(32), limits=Limits(min=32, max=32), micro=8)
    load(second, tmp_path)
    assert (second.batches.plan.micro_batch_size, second.batches.plan.global_batch_size) == (8, 32)
    second.train(8)
    assert lines(tmp_path / "journal.jsonl")[-1]["plan"]["global_batch_size"] == 32


def test_another_length_or_shape_of_the_schedule_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(ValueError, match="saved with total="):
        load(Run(tmp_path, total=adabatch.examples(4000)), tmp_path)


# --- whose it is ------------------------------------------------------------------------------------------------------


def test_parameters_in_another_order_are_refused_by_name(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 1))
    first = Run(tmp_path, model=model)
    first.train(3)
    adabatch.save(tmp_path / "saved", **first.parts())
    before = weights(model)
    for order, words in (
        ([1, 0, 2], r"parameter 0 was 0\.weight of shape \(6, 6\) .* is 1\.weight of shape \(6, 6\) now"),
        ([0, 2, 1], r"parameter 2 was 1\.weight of shape \(6, 6\) .* is 2\.weight of shape \(1, 6\) now"),
    ):
        parameters = [parameter for index in order for parameter in model[index].parameters()]
        second = Run(tmp_path, model=model, optimizer=AdamW(parameters, lr=0.01))
        with pytest.raises(ValueError, match=words):
            load(second, tmp_path)
        second.batches.remove()
        assert torch.equal(weights(model), before)
    assert said(load(Run(tmp_path, model=model), tmp_path)) == []


def test_settings_of_local_sgd_that_are_taken_over_are_said(tmp_path: Path) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    saved = LocalSGD(model, optimizer, sync_every=4, outer=Nesterov(lr=0.7))
    adabatch.save(tmp_path, model=model, optimizer=optimizer, local_sgd=saved)
    for local in (saved, LocalSGD(model, optimizer, sync_every=8, outer=Nesterov(lr=0.5))):
        loaded = adabatch.load(tmp_path, model=model, optimizer=optimizer, local_sgd=local)
        assert loaded is not None
        names = [each.name for each in loaded.differences]
        assert names == ([] if local is saved else ["local_sgd.period", "local_sgd.outer"])
    assert str(loaded.differences[0]).startswith("local_sgd.period was 'Fixed(sync_every=4)' when the checkpoint was")
