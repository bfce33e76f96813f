"""``AdaptiveBatch`` on one process: equal to what one would write by hand, and the same after a resume."""

from __future__ import annotations

import gc
import json
import math
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support.loops import lines, loss_of, network, regression, train, weights
from support.options import grouped
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from adabatch import (
    AdaptiveBatch,
    Constant,
    GlobalOrder,
    Limits,
    LinearRamp,
    NormTest,
    ProgressLR,
    Stage,
    Stages,
    examples,
    lr,
    steps,
    tokens,
)
from adabatch.adaptive.options import Guard

# --- passes over a loader -------------------------------------------------------------------------------------------


def first_examples(
    loader: DataLoader[Any], *, passes: int = 1, set_epochs: bool = False, **options: Any
) -> list[float]:
    """The first number of each example seen, over some passes."""
    model = network()
    optimizer = SGD(model.parameters(), lr=0.0)
    batches = AdaptiveBatch(model, optimizer, Constant(8), micro_batch_size=4)
    seen: list[float] = []
    for epoch in range(passes):
        if set_epochs:
            loader.sampler.set_epoch(epoch)
        for step in batches.steps(loader, **options):
            for batch in step:
                seen += batch[0][:, 0].tolist()
                step.backward(loss_of(model, batch))
            optimizer.step()
            optimizer.zero_grad()
    return seen


def sampled(num_examples: int = 16) -> DataLoader[Any]:
    data = regression(num_examples)
    return DataLoader(data, batch_size=4, sampler=DistributedSampler(data, num_replicas=1, rank=0, seed=5))


def plain(epochs: range) -> list[float]:
    loader = sampled()
    seen: list[float] = []
    for epoch in epochs:
        loader.sampler.set_epoch(epoch)
        seen += [float(x) for batch in loader for x in batch[0][:, 0]]
    return seen


def test_an_epoch_that_the_user_set_stands() -> None:
    assert first_examples(sampled(), passes=3, set_epochs=True) == plain(range(3))


def test_each_pass_has_an_order_of_its_own() -> None:
    assert first_examples(sampled(), passes=3) == plain(range(3))
    assert first_examples(sampled(), until=examples(48)) == plain(range(3))


def test_a_resumed_run_goes_on_from_the_epoch_that_was_set() -> None:
    loader = sampled()
    loader.sampler.set_epoch(7)
    assert first_examples(loader, until=examples(32)) == plain(range(7, 9))


class Indifferent(Optimizer):
    """Has a learning rate, and does not look at it."""

    def __init__(self, parameters: Any, lr: Tensor) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure: None = None) -> None:
        pass


def test_a_rate_on_an_accelerator_is_not_read(tmp_path) -> None:
    """Reading it would wait for the device in every step; the meta device, which cannot be read, stands for one."""
    model = network()
    optimizer = Indifferent(model.parameters(), lr=torch.tensor(0.1, device="meta"))
    batches = AdaptiveBatch(
        model, optimizer, Constant(8), micro_batch_size=4, reference_batch_size=4, lr_rule="sqrt",
        journal=tmp_path / "journal.jsonl",
    )  # fmt: skip
    train(batches, model, optimizer, DataLoader(regression(8), batch_size=4))
    (line,) = lines(tmp_path / "journal.jsonl")
    assert line["lr"] == {"base": [None], "shape": [None], "factor": 2**0.5, "applied": [None]}


# --- saved and loaded -----------------------------------------------------------------------------------------------


def adaptive(criterion: Any, **options: Any) -> AdaptiveBatch:
    model = network()
    return AdaptiveBatch(model, SGD(model.parameters(), lr=0.1), criterion, **grouped(options))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"micro_batch_size": 4, "limits": Limits(min=8, max=64)}, (4, 16)),
        ({"micro_batch_size": 4, "limits": Limits(min=8, max=32)}, (4, 8)),
        ({"micro_batch_size": 4, "limits": Limits(min=96, max=128)}, (4, 24)),
        ({"micro_batch_size": 8, "limits": Limits(min=16, max=64)}, (8, 8)),
        ({"micro_batch_size": 4, "max_micro_batch_size": 16, "limits": Limits(min=8, max=64)}, (4, 16)),
        ({"micro_batch_size": 64, "limits": Limits(min=128, max=128)}, (64, 2)),
    ],
    ids=str,
)
def test_a_loaded_plan_is_one_that_the_new_run_can_carry_out(options: Any, expected: tuple[int, int]) -> None:
    saved = adaptive(Constant(64), micro_batch_size=4).state_dict()
    batches = adaptive(NormTest(eta=0.5), **options)
    batches.load_state_dict(json.loads(json.dumps(saved)))
    assert (batches.plan.micro_batch_size, batches.plan.accumulation_steps) == expected


def test_a_plan_of_one_part_is_not_loaded_into_a_run_that_measures() -> None:
    saved = adaptive(Constant(8), micro_batch_size=8).state_dict()
    batches = adaptive(NormTest(eta=0.5), micro_batch_size=8, limits=Limits(min=LinearRamp(8, 64, steps(10)), max=64))
    batches.load_state_dict(saved)
    assert batches.plan.num_parts == 2


def test_a_resume_under_a_floor_that_no_plan_reaches_takes_the_largest_plan_below_the_ceiling() -> None:
    """As ``decide`` does in the run that goes on: at 95 to 100 examples no batch of 16s fits."""
    limits = Limits(min=LinearRamp(16, 95, examples(64)), max=100)
    model = network()
    optimizer = SGD(model.parameters(), lr=0.0)
    batches = AdaptiveBatch(model, optimizer, NormTest(eta=0.5), micro_batch_size=16, limits=limits)
    train(batches, model, optimizer, GlobalOrder(regression(400), seed=0), until=examples(64))
    assert batches.plan.global_batch_size == 96
    resumed = adaptive(
        NormTest(eta=0.5), micro_batch_size=64, limits=Limits(min=LinearRamp(128, 150, examples(64)), max=190)
    )
    resumed.load_state_dict(batches.state_dict())
    assert resumed.plan.global_batch_size == 128


def test_a_state_from_the_future_is_refused() -> None:
    batches = adaptive(Constant(8), micro_batch_size=4)
    with pytest.raises(ValueError, match=r"format 3.* upgrade adabatch"):
        batches.load_state_dict({**batches.state_dict(), "format": 3})


# --- passes over a GlobalOrder --------------------------------------------------------------------------------------


def sizes_of(batches: AdaptiveBatch, model: nn.Module, optimizer: SGD, loader: Any, **options: Any) -> list[int]:
    """Examples of each step of a pass."""
    sizes: list[int] = []
    train(batches, model, optimizer, loader, each=lambda step: sizes.append(step.global_batch_size), **options)
    return sizes


def test_a_pass_ends_with_the_step_that_crosses_the_epoch_and_the_next_goes_on_there() -> None:
    model, order = network(), GlobalOrder(regression(30))
    optimizer = SGD(model.parameters(), lr=0.0)
    batches = AdaptiveBatch(model, optimizer, Constant(8), micro_batch_size=4)
    assert sizes_of(batches, model, optimizer, order) == [8] * 4  # 32 of 30
    assert (order.epoch, order.examples_seen) == (1, 2)
    assert sizes_of(batches, model, optimizer, order) == [8] * 4  # to 64
    assert (order.epoch, order.examples_seen) == (2, 4)
    assert sizes_of(batches, model, optimizer, order) == [8] * 4  # to 96
    assert sizes_of(batches, model, optimizer, order) == [8] * 3  # to 120, exactly
    assert (order.epoch, order.examples_seen) == (4, 0)


@pytest.mark.parametrize(
    ("until", "count"),
    [(examples(100), 13), (examples(96), 12), (steps(7), 7), (tokens(500), 7), (steps(0), 0)],
    ids=str,
)
@pytest.mark.parametrize("source", ["order", "loader"])
def test_until_is_reached_across_epochs_and_counts_from_the_beginning(until: Any, count: int, source: str) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.0)
    batches = AdaptiveBatch(model, optimizer, Constant(8), micro_batch_size=4, tokens_per_example=10)
    loader = GlobalOrder(regression(24)) if source == "order" else DataLoader(regression(24), batch_size=4)
    assert sizes_of(batches, model, optimizer, loader, until=until) == [8] * count
    with pytest.warns(RuntimeWarning, match="counts from the beginning of the run") if count else nullcontext():
        assert sizes_of(batches, model, optimizer, loader, until=until) == []  # it is over
    assert batches.state_dict()["consumed"] == {
        "examples": 8 * count,
        "steps": count,
        "tokens": 80 * count,
        "gain_steps": None,
    }


def test_the_micro_batch_grows_first_and_accumulation_after() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.0)
    table = Stages(4, [Stage(steps(1), 8), Stage(steps(2), 16), Stage(steps(3), 48), Stage(steps(4), 4)])
    batches = AdaptiveBatch(model, optimizer, table, micro_batch_size=4, max_micro_batch_size=16)
    shapes = []
    for step in batches.steps(GlobalOrder(regression(64)), until=steps(5)):
        shapes.append([])
        for x, y in step:
            shapes[-1].append(len(x))
            step.backward((model(x) - y).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    assert shapes == [[4], [8], [16], [16, 16, 16], [4]]


# --- updates that are left out --------------------------------------------------------------------------------------


def test_an_update_that_never_came_consumes_data_and_moves_nothing_else(tmp_path) -> None:
    """What a gradient scaler does on overflow: it does not call ``optimizer.step()``."""
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    batches = AdaptiveBatch(
        model,
        optimizer,
        Stages(8, [Stage(examples(24), 16)]),
        micro_batch_size=4,
        lr_rule="linear",
        journal=tmp_path / "journal.jsonl",
    )
    schedule = ProgressLR(optimizer, lr.linear(), batches, total=examples(160))
    seen = []
    for index, step in enumerate(batches.steps(GlobalOrder(regression(64)), until=examples(56))):
        for x, y in step:
            step.backward((model(x) - y).square().mean())
        before = weights(model)
        if index != 1:
            optimizer.step()
        assert torch.equal(before, weights(model)) == (index == 1)
        optimizer.zero_grad()
        schedule.step()
        seen.append((step.global_batch_size, batches.progress.examples, batches.progress.steps, schedule.get_last_lr()))
    batches.remove()
    assert [each[:3] for each in seen] == [(8, 8, 1), (8, 8, 1), (8, 16, 2), (16, 32, 3), (16, 48, 4)]
    assert seen[0][3] == seen[1][3] == [pytest.approx(0.1 * (1 - 8 / 160))]
    assert seen[2][3] == [pytest.approx(2 * 0.1 * (1 - 16 / 160))]  # the next batch is twice as large
    journal = lines(tmp_path / "journal.jsonl")
    assert [line["applied"] for line in journal] == [True, False, True, True, True]
    assert [line["lr"] is None for line in journal] == [False, True, False, False, False]
    assert [line["examples"] for line in journal] == [0, 8, 16, 24, 40]


def test_an_update_outside_the_loop_is_the_users_own() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    batches = AdaptiveBatch(model, optimizer, Constant(8), micro_batch_size=4)
    loss_of(model, regression(4).tensors).backward()
    optimizer.step()
    assert batches.progress.steps == 0


@pytest.mark.parametrize("skip", [True, False])
def test_a_loss_that_is_not_a_number_is_left_out_unless_that_is_not_wanted(tmp_path, skip: bool) -> None:
    model = network()
    optimizer = Adam(model.parameters(), lr=0.1)
    batches = AdaptiveBatch(
        model,
        optimizer,
        NormTest(eta=0.5),
        micro_batch_size=4,
        limits=Limits(min=8, max=32),
        guard=Guard(skip_nonfinite=skip),
        journal=tmp_path / "journal.jsonl",
    )
    for index, step in enumerate(batches.steps(GlobalOrder(regression(64)), until=steps(3))):
        for x, y in step:
            step.backward((model(x) - y).square().mean() * (float("nan") if index == 1 else 1.0))
        assert step.finite == (index != 1)
        optimizer.step()
        optimizer.zero_grad()
        if index == 1:
            assert bool(torch.isfinite(weights(model)).all()) == skip
            break
    batches.remove()
    _, line = lines(tmp_path / "journal.jsonl")
    assert line["reason"] == "not finite"
    assert line["loss"] is None
    assert line["applied"] == (not skip)
    assert line["next"] == line["plan"]["global_batch_size"]


# --- it leaves nothing behind ---------------------------------------------------------------------------------------


def test_remove_leaves_model_and_optimizer_as_they_were(tmp_path) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    batches = AdaptiveBatch(
        model, optimizer, NormTest(eta=0.5), micro_batch_size=4, limits=Limits(min=8, max=32), lr_rule="sqrt"
    )
    train(batches, model, optimizer, GlobalOrder(regression(64)))
    batches.remove()
    assert not any(p._backward_hooks for p in model.parameters())
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_state_dict_pre_hooks
    gone = [weakref.ref(batches), weakref.ref(batches._probe)]
    del batches
    gc.collect()
    assert [each() for each in gone] == [None, None]


def test_a_run_holds_on_to_no_step_and_no_graph() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    batches = AdaptiveBatch(model, optimizer, NormTest(eta=0.5), micro_batch_size=4, limits=Limits(min=8, max=8))
    gone = []
    losses = []
    for step in batches.steps(GlobalOrder(regression(64)), until=steps(5)):
        for x, y in step:
            loss = (model(x) - y).square().mean()
            step.backward(loss)
            losses.append(weakref.ref(loss))
        optimizer.step()
        optimizer.zero_grad()
        gone.append(weakref.ref(step))
    del step, loss
    gc.collect()
    assert [each() for each in gone] == [None] * 5
    assert [each() for each in losses] == [None] * 10


def test_the_order_of_random_numbers_is_that_of_the_loop_by_hand() -> None:
    """Dropout draws the same masks, measured or not."""
    torch.manual_seed(0)
    model = nn.Sequential(network(), nn.Dropout(0.5))
    optimizer = SGD(model.parameters(), lr=0.1)
    batches = AdaptiveBatch(model, optimizer, NormTest(eta=0.5), micro_batch_size=4, limits=Limits(min=8, max=8))
    torch.manual_seed(1)
    train(batches, model, optimizer, GlobalOrder(regression(16)))
    after = torch.get_rng_state()
    torch.manual_seed(1)
    for _ in range(4):
        model(torch.zeros(4, 6))
    assert torch.equal(torch.get_rng_state(), after)


def test_the_noise_scale_is_unknown_at_first() -> None:
    batches = adaptive(NormTest(eta=0.5), micro_batch_size=4, limits=Limits(min=8, max=32))
    assert math.isnan(batches.noise_scale)
    assert batches.lr_factor == 1.0
    assert batches.plan.global_batch_size == 8
    assert batches.progress_after_next.examples == 8
