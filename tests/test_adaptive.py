"""``AdaptiveBatch`` on one process: equal to what one would write by hand, and the same after a resume."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from loops import lines, loss_of, network, regression, train
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from adabatch import AdaptiveBatch, Constant, Limits, LinearRamp, NormTest, examples, steps

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
    return AdaptiveBatch(model, SGD(model.parameters(), lr=0.1), criterion, **options)


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


def test_a_state_from_the_future_is_refused() -> None:
    batches = adaptive(Constant(8), micro_batch_size=4)
    with pytest.raises(ValueError, match=r"format 2.* upgrade adabatch"):
        batches.load_state_dict({**batches.state_dict(), "format": 2})
