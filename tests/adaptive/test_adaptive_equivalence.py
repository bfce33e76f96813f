"""``AdaptiveBatch`` on one process, to the bit: equal to a loop by hand, and after a resume to a run without one."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.loops import journal_text, lines, network, regression, train, train_by_hand, weights
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.utils.data import DataLoader

from adabatch import (
    AdaptiveBatch,
    Constant,
    Control,
    GlobalOrder,
    Limits,
    NormTest,
    ProgressLR,
    Stage,
    Stages,
    examples,
    lr,
    steps,
)
from adabatch.adaptive.options import Measure

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.05, momentum=0.9),
    "adam": lambda parameters: Adam(parameters, lr=0.01),
}


def shuffled(num_examples: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(4)
    return DataLoader(regression(num_examples), batch_size=4, shuffle=True, generator=generator)


def in_order(order: GlobalOrder, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The micro-batches of 4 that a loop by hand would take from the order."""
    x, y = order.dataset.tensors
    positions = torch.cat([order.permutation(epoch) for epoch in range(epochs)])
    for chunk in positions.split(4):
        yield x[chunk], y[chunk]


# --- a constant policy is the loop by hand --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accumulation", "monitor"), [(1, False), (3, False), (4, False), (3, True), (4, True)], ids=str
)
@pytest.mark.parametrize("source", ["loader", "order"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_constant_policy_is_a_loop_by_hand(optimizer: str, accumulation: int, source: str, monitor: bool) -> None:
    by_hand, model = network(), network()
    theirs, ours = OPTIMIZERS[optimizer](by_hand.parameters()), OPTIMIZERS[optimizer](model.parameters())
    batches = AdaptiveBatch(
        model, ours, Constant(4 * accumulation), micro_batch_size=4, measure=Measure(monitor=monitor)
    )
    if source == "order":
        order = GlobalOrder(regression(96), seed=2)
        train_by_hand(by_hand, theirs, in_order(order, 2), accumulation=accumulation)
        train(batches, model, ours, order, until=examples(192))
    else:
        loader, copy = shuffled(96), shuffled(96)
        for _ in range(2):
            train_by_hand(by_hand, theirs, copy, accumulation=accumulation)
            train(batches, model, ours, loader)
    assert batches.progress.steps == 192 // (4 * accumulation)
    assert torch.equal(weights(model), weights(by_hand))
    for mine, other in zip(ours.state.values(), theirs.state.values(), strict=True):
        assert all(torch.equal(mine[key], other[key]) for key in other)


def test_a_loader_with_workers_is_the_loop_by_hand_too() -> None:
    by_hand, model = network(), network()
    theirs, ours = SGD(by_hand.parameters(), lr=0.05), SGD(model.parameters(), lr=0.05)
    order = GlobalOrder(regression(48), seed=2, num_workers=2)
    train_by_hand(by_hand, theirs, in_order(order, 1), accumulation=3)
    train(AdaptiveBatch(model, ours, Constant(12), micro_batch_size=4), model, ours, order)
    assert torch.equal(weights(model), weights(by_hand))


# --- the gradient of a step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[4, 4, 4], [4, 4, 1], [3], [1, 4, 2]], ids=str)
@pytest.mark.parametrize("monitor", [False, True], ids=["", "monitor"])
def test_the_gradient_is_that_of_the_mean_over_the_examples(sizes: list[int], monitor: bool) -> None:
    """Whatever the sizes of the micro-batches: a small last one does not weigh more an example."""
    model, oracle = network(dtype=torch.float64), network(dtype=torch.float64)
    x, y = regression(sum(sizes), dtype=torch.float64).tensors
    optimizer = SGD(model.parameters(), lr=0.0)
    batches = AdaptiveBatch(model, optimizer, Constant(12), micro_batch_size=4, measure=Measure(monitor=monitor))
    loader = list(zip(x.split(sizes), y.split(sizes), strict=True))
    found = []
    for step in batches.steps(loader, count=lambda batch: len(batch[0])):
        for x_part, y_part in step:
            step.backward((model(x_part) - y_part).square().mean())
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        batches.leave_out()  # which drops the gradients
    ((oracle(x) - y).square().mean()).backward()
    for mine, other in zip(found, oracle.parameters(), strict=True):
        assert torch.allclose(mine, other.grad, rtol=1e-12, atol=1e-12)  # type: ignore[arg-type]
    assert step.global_batch_size == sum(sizes)
    if monitor:
        assert step.loss == pytest.approx((oracle(x) - y).square().mean().item(), rel=1e-12)


def run_steps(
    batches: AdaptiveBatch, model: nn.Module, loader: Any, optimizer: SGD | None = None, **options: Any
) -> list[Any]:
    """Steps whose updates change nothing: left out, or at a rate of zero, so that the gradient of the last stays."""
    found = []
    for step in batches.steps(loader, **options):
        for x, y in step:
            step.backward((model(x) - y).square().mean())
        if optimizer is None:
            batches.leave_out()
        else:
            optimizer.step()
        found.append(step)
    return found


def test_batches_may_be_dicts_and_counted_by_the_user() -> None:
    model = network()
    batches = AdaptiveBatch(model, SGD(model.parameters(), lr=0.0), Constant(8), micro_batch_size=4)
    x, y = regression(12).tensors
    loader = [{"names": ["a"] * 4, "x": x[i : i + 4], "y": y[i : i + 4]} for i in (0, 4, 8)]
    sizes = []
    for step in batches.steps(loader):
        for batch in step:
            step.backward((model(batch["x"]) - batch["y"]).square().mean())
        batches.leave_out()
        sizes.append(step.global_batch_size)
    for step in batches.steps([[loader[0], 4], [loader[1], 2]], count=lambda batch: batch[1]):
        for batch, _ in step:
            step.backward((model(batch["x"]) - batch["y"]).square().mean())
        batches.leave_out()
        sizes.append(step.global_batch_size)
    assert sizes == [8, 4, 6]


# --- resumed is uninterrupted ---------------------------------------------------------------------------------------


def loaded(saved: bytes) -> dict[str, Any]:
    return torch.load(io.BytesIO(saved), weights_only=True)  # type: ignore[no-any-return]


class Everything:
    """All that a run has, and all that it saves."""

    def __init__(self, journal: Path, *, grows_micro_batch: bool) -> None:
        self.model = network()
        self.optimizer = Adam(self.model.parameters(), lr=0.01)
        self.order = GlobalOrder(regression(100), seed=3)
        self.batches = AdaptiveBatch(
            self.model,
            self.optimizer,
            NormTest(eta=0.35),
            micro_batch_size=2,
            max_micro_batch_size=8 if grows_micro_batch else None,
            limits=Limits(min=4, max=64),
            control=Control(memory=4, confidence=0.6, interval=2, hold=1),
            lr_rule="gain",
            journal=journal,
        )
        self.schedule = ProgressLR(
            self.optimizer, lr.wsd(cooldown=0.4), self.batches, total=examples(400), warmup=steps(5)
        )
        self.rates: list[list[float]] = []

    def parts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("model", "optimizer", "order", "batches", "schedule")}

    def own(self) -> dict[str, Any]:
        """What adabatch saves, which JSON holds without loss."""
        state = {name: self.parts()[name].state_dict() for name in ("order", "batches", "schedule")}
        assert json.loads(json.dumps(state, allow_nan=False)) == state
        return state

    def save(self) -> bytes:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), **self.own()}
        file = io.BytesIO()
        torch.save(state, file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        state = loaded(saved)
        for name, part in self.parts().items():
            part.load_state_dict(state[name])

    def run(self, until: Any) -> list[bytes]:
        """Trains; what was saved after each step."""
        saved: list[bytes] = []
        for step in self.batches.steps(self.order, until=until):
            for x, y in step:
                step.backward((self.model(x) - y).square().mean())
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
            self.rates.append([float(rate) for rate in self.schedule.get_last_lr()])
            saved.append(self.save())
        return saved


@pytest.mark.slow
@pytest.mark.parametrize("grows_micro_batch", [False, True], ids=["accumulation", "micro-batch"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path: Path, grows_micro_batch: bool) -> None:
    whole = Everything(tmp_path / "whole.jsonl", grows_micro_batch=grows_micro_batch)
    saved = whole.run(until=examples(400))
    journal = lines(tmp_path / "whole.jsonl")
    sizes = [line["plan"]["global_batch_size"] for line in journal]
    assert len(set(sizes)) >= 4  # the batch really moved
    assert whole.order.epoch >= 3
    for at, state in enumerate(saved[:-1], start=1):
        part = Everything(tmp_path / f"{at}.jsonl", grows_micro_batch=grows_micro_batch)
        part.load(state)
        assert part.own() == {name: loaded(state)[name] for name in part.own()}
        part.run(until=examples(400))
        assert torch.equal(weights(part.model), weights(whole.model)), at
        assert part.rates == whole.rates[at:]
        assert lines(tmp_path / f"{at}.jsonl") == journal[at:]


def test_two_runs_leave_equal_journals(tmp_path: Path) -> None:
    for name in ("a", "b"):
        Everything(tmp_path / name, grows_micro_batch=True).run(until=examples(200))
    assert journal_text(tmp_path / "a") == journal_text(tmp_path / "b")


# --- the learning rate follows the plan that made the gradient ------------------------------------------------------


class Recorder(SGD):
    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr=lr)
        self.applied: list[float] = []

    def step(self, closure: Any = None) -> Any:
        self.applied.append(float(self.param_groups[0]["lr"]))
        return super().step(closure)


@pytest.mark.parametrize(("rule", "power"), [("none", 0.0), ("sqrt", 0.5), ("linear", 1.0)])
@pytest.mark.parametrize("reference", [None, 4])
def test_the_factor_is_that_of_the_plan_that_made_the_gradient(
    tmp_path: Path, rule: Any, power: float, reference: int | None
) -> None:
    """Also where the last step of a pass is shorter than its plan: 100 examples do not fill steps of 16 and 32."""
    SGD(network().parameters(), lr=1.0)  # so that torch hooks the parent's step too
    model = network()
    optimizer = Recorder(model.parameters(), lr=0.03)
    table = Stages(8, [Stage(steps(2), 16), Stage(steps(4), 32), Stage(steps(7), 8)])
    batches = AdaptiveBatch(
        model,
        optimizer,
        table,
        micro_batch_size=4,
        lr_rule=rule,
        reference_batch_size=reference,
        journal=tmp_path / "journal.jsonl",
    )
    announced: list[float] = []
    sizes: list[int] = []
    loader = DataLoader(regression(100), batch_size=4)
    for step in batches.steps(loader, until=steps(12)):
        for x, y in step:
            step.backward((model(x) - y).square().mean())
        announced.append(batches.lr_factor)
        optimizer.step()
        optimizer.zero_grad()
        sizes.append(step.global_batch_size)
    assert sizes == [8, 8, 16, 16, 32, 20, 32, 8, 8, 8, 8, 8]
    expected = [(size / (reference or 8)) ** power for size in sizes]
    assert announced == pytest.approx(expected, rel=1e-15)
    assert optimizer.applied == [0.03 * factor for factor in announced]
    assert optimizer.param_groups[0]["lr"] == 0.03
    journal = lines(tmp_path / "journal.jsonl")
    assert [line["lr"]["factor"] for line in journal] == announced
    assert [line["lr"]["applied"] for line in journal] == [[rate] for rate in optimizer.applied]
    assert all(line["lr"]["base"] == [0.03] and line["lr"]["shape"] == [1.0] for line in journal)
    assert [line["step"] for line in journal] == list(range(12))
    assert [line["examples"] for line in journal] == [sum(sizes[:i]) for i in range(12)]
    assert all(line["applied"] for line in journal)
