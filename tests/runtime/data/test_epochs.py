"""After a pass, what counts epochs inside a loader goes to its next one: once, and not where somebody else moved it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, Sampler, TensorDataset

from adabatch import AdaptiveBatch, Constant, examples
from adabatch.runtime.data import EpochCounters

NUMBERS = TensorDataset(torch.arange(16.0)[:, None])


class Counted(DistributedSampler[Any]):
    """Notes each epoch that it is set to."""

    def __init__(self) -> None:
        super().__init__(NUMBERS, num_replicas=2, rank=0)
        self.sets: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.sets.append(epoch)
        super().set_epoch(epoch)


class Shard(Sampler[Any]):
    """As Accelerate's ``BatchSamplerShard``: a batch sampler around a batch sampler."""

    def __init__(self, batch_sampler: Any) -> None:
        self.batch_sampler = batch_sampler

    def __iter__(self) -> Any:
        return iter(self.batch_sampler)


class DeepSpeedLike:
    """Keeps its sampler where DeepSpeed's loader does."""

    def __init__(self, sampler: Any) -> None:
        self.data_sampler = sampler
        self.dataloader = DataLoader(NUMBERS, batch_size=2, sampler=sampler)

    def __iter__(self) -> Any:
        return iter(self.dataloader)


@pytest.mark.parametrize(
    "around",
    [
        lambda sampler: DataLoader(NUMBERS, batch_size=2, sampler=sampler),
        lambda sampler: DataLoader(NUMBERS, batch_sampler=BatchSampler(sampler, 2, drop_last=False)),
        lambda sampler: DataLoader(NUMBERS, batch_sampler=Shard(BatchSampler(sampler, 2, drop_last=False))),
        DeepSpeedLike,
    ],
    ids=["sampler", "batch_sampler", "shard", "DeepSpeed"],
)
def test_a_sampler_is_found_wherever_it_is_and_set_once(around: Any) -> None:
    sampler = Counted()
    EpochCounters(around(sampler)).advance()
    assert sampler.sets == [1]


def test_an_epoch_that_somebody_else_sets_stands() -> None:
    sampler = Counted()
    sampler.set_epoch(4)  # before the pass
    counters = EpochCounters(DataLoader(NUMBERS, sampler=sampler))
    counters.advance()
    assert sampler.epoch == 5
    sampler.set_epoch(9)  # during it: a loop of one's own, or a sampler that moves itself
    counters.advance()
    assert sampler.epoch == 9


def test_a_stream_that_counts_epochs_is_moved_too() -> None:
    class Stream(IterableDataset[Any]):
        epoch = 2

        def __iter__(self) -> Any:
            return iter(())

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    stream = Stream()
    EpochCounters(DataLoader(stream)).advance()
    assert stream.epoch == 3


@pytest.mark.parametrize("loader", [DataLoader(NUMBERS), [1, 2], iter([1])], ids=["DataLoader", "list", "iterator"])
def test_a_loader_without_epochs_is_left_alone(loader: Any) -> None:
    EpochCounters(loader).advance()


@pytest.mark.parametrize("kind", ["sampler", "batch_sampler"])
def test_each_pass_of_a_run_has_an_order_of_its_own(kind: str) -> None:
    sampler = DistributedSampler(NUMBERS, num_replicas=2, rank=0, seed=1)
    inner = {"sampler": {"batch_size": 2, "sampler": sampler}, "batch_sampler": {
        "batch_sampler": BatchSampler(sampler, 2, drop_last=False)}}[kind]  # fmt: skip
    model = nn.Linear(1, 1)
    optimizer = SGD(model.parameters(), lr=0.0)
    batches = AdaptiveBatch(model, optimizer, Constant(8), micro_batch_size=2)
    passes = []
    for step in batches.steps(DataLoader(NUMBERS, **inner), until=examples(24)):
        seen = []
        for (x,) in step:
            step.backward(model(x).mean())
            seen += x[:, 0].int().tolist()
        passes.append(seen)
        optimizer.step()
        optimizer.zero_grad()
    expected = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        expected.append(list(sampler))
    assert passes == expected
