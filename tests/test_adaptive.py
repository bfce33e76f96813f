"""``AdaptiveBatch`` on one process: equal to what one would write by hand, and the same after a resume."""

from __future__ import annotations

from typing import Any

import torch
from loops import lines, loss_of, network, regression, train
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from adabatch import AdaptiveBatch, Constant, examples

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
