"""Several optimizers that make one update: one decision, one factor, one skip, one state."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.loops import network, regression
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer
from torch.utils.data import DataLoader

import adabatch
from adabatch import AdaptiveBatch, Checkpoints, GlobalOrder, Limits, NormTest, ProgressLR, lr, steps
from adabatch.optim import Shampoo
from adabatch.runtime.optimizers.joined import JoinedOptimizers

Muon: Any = getattr(torch.optim, "Muon", Adam)  # torch 2.9


def pair(model: nn.Module) -> list[Optimizer]:
    """Muon for the matrices, AdamW for the rest."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    return [Muon(matrices, lr=0.02), AdamW(others, lr=1e-3)]


def adaptive(model: nn.Module, optimizer: Any, **options: Any) -> AdaptiveBatch:
    options = {"micro_batch_size": 4, "limits": Limits(min=16, max=16), **options}
    return AdaptiveBatch(model, optimizer, options.pop("criterion", NormTest(eta=0.5)), **options)


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    loss: Tensor = (model(x) - y).square().mean()
    return loss


def loader(num_steps: int) -> DataLoader[Any]:
    return DataLoader(regression(16 * num_steps), batch_size=4)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first to last", "last to first"])
def test_they_are_the_loop_by_hand_with_one_factor(order: tuple[int, int], tmp_path: Path) -> None:
    model, by_hand = network(), network()
    optimizers, theirs = pair(model), pair(by_hand)
    batches = adaptive(model, optimizers, lr_rule="sqrt", reference_batch_size=1, journal=tmp_path / "journal.jsonl")
    schedule = ProgressLR(optimizers, lr.linear(), batches, total=steps(8))
    for number, step in enumerate(batches.steps(loader(4))):
        for batch in step:
            step.backward(loss_of(model, batch))
            (loss_of(by_hand, batch) / 4).backward()
        for index in order:
            optimizers[index].step()
            assert batches.progress.steps == number + (index == order[-1])
        for optimizer, base in zip(theirs, (0.02, 1e-3), strict=True):
            optimizer.param_groups[0]["lr"] = 4 * base * (1 - number / 8)
            optimizer.step()
            optimizer.zero_grad()
        for optimizer in optimizers:
            optimizer.zero_grad()
        schedule.step()
    assert torch.allclose(weights(model), weights(by_hand), rtol=1e-6, atol=1e-7)
    assert [o.param_groups[0]["lr"] for o in optimizers] == pytest.approx([0.01, 5e-4])
    lines = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert [line["lr"]["applied"] for line in lines] == [
        pytest.approx([0.08 * (1 - n / 8), 4e-3 * (1 - n / 8)]) for n in range(4)
    ]
    assert [line["applied"] for line in lines] == [True] * 4


@pytest.mark.parametrize("whole", [False, True], ids=["each", "whole"])
def test_a_step_that_is_not_finite_is_left_out_by_all(whole: bool) -> None:
    model = network()
    joined = JoinedOptimizers(pair(model))
    batches = adaptive(model, joined)
    for number, step in enumerate(batches.steps(loader(3))):
        for batch in step:
            step.backward(loss_of(model, batch) * (math.nan if number == 1 else 1.0))
        before = weights(model)
        for optimizer in [joined] if whole else joined.each:
            optimizer.step()
        assert torch.equal(before, weights(model)) == (number == 1)
        joined.zero_grad()
        assert all(p.grad is None for p in model.parameters())
    assert (batches.progress.steps, batches.consumed.steps) == (2, 3)


@pytest.mark.parametrize("interval", [1, 3])
def test_a_scaler_leaves_a_step_out_for_all_of_them(interval: int) -> None:
    """It judges each optimizer by its own gradients; of one they overflow, of the other they do not."""
    model = network()
    optimizers = pair(model)
    scaler = GradScaler("cpu", init_scale=8.0)
    batches = adaptive(
        model,
        optimizers,
        engine=adabatch.EngineOptions(scaler=scaler),
        guard=adabatch.Guard(skip_nonfinite="probed"),
        control=adabatch.Control(interval=interval),
    )
    for number, step in enumerate(batches.steps(loader(4))):
        overflow = model[0].bias.register_hook(lambda grad: torch.full_like(grad, math.inf)) if number == 1 else None
        for batch in step:
            step.backward(loss_of(model, batch))
        if overflow is not None:
            overflow.remove()
        before = weights(model)
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        assert torch.equal(before, weights(model)) == (number == 1)
    assert (batches.progress.steps, batches.consumed.steps) == (3, 4)


def test_the_one_that_is_not_stepped_is_named() -> None:
    model = network()
    muon, adamw = pair(model)
    loop = adaptive(model, [muon, adamw]).steps(loader(4))
    for _ in range(2):
        step = next(loop)
        for batch in step:
            step.backward(loss_of(model, batch))
        muon.step()
        muon.zero_grad()
        adamw.zero_grad()
    words = rf"of the AdamW was not called \(the optimizers are {type(muon).__name__} and AdamW\)"
    with pytest.raises(RuntimeError, match=words):
        next(loop)


def test_what_some_of_them_lack_follows_in_the_others() -> None:
    model = network()
    optimizers = pair(model)
    batches = adaptive(model, optimizers, follow=("betas",), reference_batch_size=4)
    for step in batches.steps(loader(2)):
        for batch in step:
            step.backward(loss_of(model, batch))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert optimizers[1].param_groups[0]["betas"] == (0.9, 0.999)
    assert [float(state["step"]) for state in optimizers[1].state.values()] == [8.0] * 2  # in updates of 4 examples
    first, *others = model.parameters()
    counted: list[Optimizer] = [Adagrad([first], lr=0.1), AdamW(others, lr=0.1)]
    batches = adaptive(model, counted, follow=("betas",), reference_batch_size=4)
    step = next(batches.steps(loader(1)))
    for batch in step:
        step.backward(loss_of(model, batch))
    for optimizer in counted:
        optimizer.step()
    assert [float(state["step"]) for state in counted[0].state.values()] == [1.0]  # its count is none of averages
    with pytest.raises(ValueError, match=r"follow='eps', but SGD and SGD has no eps"):
        adaptive(model, [SGD([first], lr=0.1), SGD(others, lr=0.1)], follow=("eps",))
    with pytest.raises(ValueError, match="decay of SGD is part of the gradient"):
        adaptive(model, [SGD([first], lr=0.1), AdamW(others, lr=0.1)], follow=("weight_decay",))


def test_the_rule_of_a_second_order_one_is_that_of_all() -> None:
    model = network()
    first, *others = model.parameters()
    batches = adaptive(model, [Shampoo([first], lr=0.1), AdamW(others)], reference_batch_size=4)
    assert batches.lr_factor == 2.0


def run(model: nn.Module, optimizers: list[Optimizer], folder: Path, until: int) -> None:
    order = GlobalOrder(regression(64))
    batches = adaptive(model, optimizers, lr_rule="sqrt", reference_batch_size=4)
    schedule = ProgressLR(optimizers, lr.cosine(), batches, total=steps(8))
    parts: dict[str, Any] = {"optimizer": optimizers, "batches": batches, "schedule": schedule, "order": order}
    adabatch.load(folder, model=model, **parts)
    for step in batches.steps(order, until=steps(until)):
        for batch in step:
            step.backward(loss_of(model, batch))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
    adabatch.save(folder, model=model, **parts)
    batches.remove()


def test_a_resumed_run_is_the_whole_one(tmp_path: Path) -> None:
    whole, model = network(), network()
    run(whole, pair(whole), tmp_path / "whole", 6)
    for until in (3, 6):
        model = network(seed=until - 3)
        run(model, pair(model), tmp_path / "parts", until)
    assert torch.equal(weights(whole), weights(model))
    with pytest.raises(ValueError, match="was saved with the optimizer"):
        adabatch.load(tmp_path / "whole", model=model, optimizer=pair(model)[::-1])
    with pytest.raises(ValueError, match="was saved with the optimizer"):
        Checkpoints(tmp_path / "whole", model=model, optimizer=SGD(model.parameters(), lr=0.1)).load()


def test_a_state_goes_to_whom_it_was_saved_of() -> None:
    model = network()
    joined = JoinedOptimizers(pair(model))
    loss_of(model, regression(8).tensors).backward()
    joined.step()
    saved = copy.deepcopy(joined.state_dict())
    assert [len(group["params"]) for group in saved["param_groups"]] == [2, 2]
    assert sorted(saved["state"]) == [0, 1, 2, 3]
    other = JoinedOptimizers(pair(network()))
    other.load_state_dict(saved)
    for mine, theirs in zip(joined.each, other.each, strict=True):
        for a, b in zip(mine.state.values(), theirs.state.values(), strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a)
    with pytest.raises(ValueError, match=r"the state is that of \w+, AdamW, but the optimizers are AdamW, \w+"):
        JoinedOptimizers(pair(network())[::-1]).load_state_dict(saved)
    first, *others = network().parameters()
    with pytest.raises(ValueError, match=r"groups of \[2, 2\] parameters, the optimizers have groups of \[1, 3\]"):
        JoinedOptimizers([Muon([first], lr=0.1), AdamW(others)]).load_state_dict(saved)
    again = copy.deepcopy(joined)
    assert [type(one) for one in again.each] == [type(one) for one in joined.each]
    assert again.param_groups[0]["lr"] == 0.02


def test_they_are_seen_as_one() -> None:
    model = network()
    optimizers = pair(model)
    joined = JoinedOptimizers(optimizers)
    assert joined.param_groups[1] is optimizers[1].param_groups[0]
    extra = nn.Parameter(torch.zeros(2))
    optimizers[1].add_param_group({"params": [extra], "lr": 0.5})
    assert [group["lr"] for group in joined.param_groups] == [0.02, 1e-3, 0.5]

    def closure() -> Tensor:
        joined.zero_grad()
        loss = loss_of(model, regression(8).tensors)
        loss.backward()
        return loss

    first = joined.step(closure)
    assert joined.step(closure) < first
    assert set(joined.state) == set(model.parameters())


def test_a_group_that_joins_the_first_of_them_keeps_the_base_rates_of_the_others() -> None:
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizers = [SGD([first], lr=1.0), SGD([second], lr=2.0)]
    schedule = ProgressLR(optimizers, lr.linear(), total=steps(10))
    optimizers[0].step()
    schedule.step()
    assert schedule.state_dict()["steps"] == 0  # half of an update
    optimizers[1].step()
    optimizers[0].add_param_group({"params": [nn.Parameter(torch.zeros(2))], "lr": 4.0})
    schedule.step()
    rates = [group["lr"] for one in optimizers for group in one.param_groups]
    assert rates == pytest.approx([0.9, 3.6, 1.8])


def test_each_may_have_a_schedule_of_its_own() -> None:
    model = network()
    optimizers = pair(model)
    batches = adaptive(model, optimizers)
    shapes = (lr.linear(), lr.constant())
    schedules = [ProgressLR(one, s, batches, total=steps(4)) for one, s in zip(optimizers, shapes, strict=True)]
    for step in batches.steps(loader(2)):
        for batch in step:
            step.backward(loss_of(model, batch))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for schedule in schedules:
            schedule.step()
    assert [one.param_groups[0]["lr"] for one in optimizers] == pytest.approx([0.01, 1e-3])


def test_what_cannot_be_joined_is_named() -> None:
    model = network()
    muon, adamw = pair(model)
    with pytest.raises(ValueError, match="at least one optimizer, got none"):
        JoinedOptimizers([])
    with pytest.raises(ValueError, match="given twice"):
        JoinedOptimizers([muon, muon])
    with pytest.raises(ValueError, match="AdamW and SGD hold the same parameter"):
        adaptive(model, [adamw, SGD(model.parameters(), lr=0.1)])
    with pytest.raises(TypeError, match="got a list with Linear in it"):
        adaptive(model, [muon, model[0]])
    with pytest.raises(RuntimeError, match=r"add the group to one of the optimizers: \w+, AdamW"):
        JoinedOptimizers([muon, adamw]).add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    assert adaptive(model, [SGD(model.parameters(), lr=0.1)]).plan.global_batch_size == 16  # a list of one is that one
