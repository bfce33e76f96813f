"""Steps from loaders that know nothing of adabatch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from adabatch.batch.plan import BatchPlan
from adabatch.runtime.collectives import Collectives
from adabatch.runtime.data import LoaderFeed, advance_epoch, num_examples_in


def plan_of(micro: int, accumulation: int) -> BatchPlan:
    return BatchPlan(micro_batch_size=micro, accumulation_steps=accumulation, dp_size=1)


def loader_feed(batches: Any, count: Any = num_examples_in) -> LoaderFeed:
    return LoaderFeed(batches, Collectives(), count=count)


def test_steps_take_every_micro_batch_of_the_loader_once() -> None:
    feed = loader_feed(DataLoader(TensorDataset(torch.arange(20)), batch_size=2))
    seen: list[int] = []
    sizes = []
    for accumulation in (1, 3, 2, 1, 1, 1, 1):
        portion = feed.take(plan_of(2, accumulation))
        sizes.append(list(portion.sizes))
        seen += [int(i) for (batch,) in portion.batches for i in batch]
        feed.consumed(portion)
    assert sizes == [[2], [2, 2, 2], [2, 2], [2], [2], [2], [2]]
    assert seen == list(range(20))
    assert feed.take(plan_of(2, 1)) is None


def test_a_loader_that_ends_in_the_middle_of_a_step_makes_a_last_shorter_one() -> None:
    feed = loader_feed(DataLoader(TensorDataset(torch.arange(7)), batch_size=2))
    assert feed.take(plan_of(2, 3)).sizes == [2, 2, 2]
    last = feed.take(plan_of(2, 3))
    assert last.sizes == [1]
    assert last.num_examples == 1
    assert feed.take(plan_of(2, 3)) is None
    assert feed.take(plan_of(2, 3)) is None


def test_an_empty_loader_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no micro-batch.*too small"):
        loader_feed([]).take(plan_of(2, 1))


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(3, 2),
        (torch.zeros(3, 2), torch.zeros(3)),
        {"x": torch.zeros(3, 2), "y": torch.zeros(3)},
        ["three names", {"x": [torch.zeros(3)]}],
        {"task": torch.tensor(1), "x": torch.zeros(3, 2)},
    ],
    ids=["tensor", "tuple", "dict", "nested", "with a scalar"],
)
def test_examples_are_counted_in_the_first_tensor(batch: Any) -> None:
    assert num_examples_in(batch) == 3


@pytest.mark.parametrize("batch", [["a", "b"], 3, torch.tensor(1.0), {}], ids=str)
def test_a_batch_without_a_tensor_asks_for_a_count(batch: Any) -> None:
    with pytest.raises(TypeError, match="pass count="):
        num_examples_in(batch)


def test_count_is_the_users_own() -> None:
    feed = loader_feed([["a", "b"], ["c"]], count=len)
    assert feed.take(plan_of(2, 2)).sizes == [2, 1]


def test_a_loader_that_raises_raises_through_the_step() -> None:
    def broken() -> Any:
        yield torch.zeros(2)
        raise OSError("the disk is gone")

    feed = loader_feed(broken())
    assert feed.take(plan_of(2, 1)).sizes == [2]
    with pytest.raises(OSError, match="the disk is gone"):
        feed.take(plan_of(2, 1))


def test_a_loader_resumed_behind_its_last_batch_may_be_empty() -> None:
    assert LoaderFeed([], Collectives(), count=len, may_be_empty=True).take(plan_of(2, 1)) is None


def test_after_a_pass_what_counts_epochs_goes_to_the_next() -> None:
    numbers = TensorDataset(torch.arange(8))
    loader = DataLoader(numbers, sampler=DistributedSampler(numbers, num_replicas=2, rank=0))
    loader.sampler.set_epoch(4)
    advance_epoch(loader)
    assert loader.sampler.epoch == 5

    class Stream(IterableDataset[Any]):
        epoch = 2

        def __iter__(self) -> Any:
            return iter(())

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    stream = Stream()
    advance_epoch(DataLoader(stream))
    assert stream.epoch == 3
    advance_epoch(DataLoader(numbers))
    advance_epoch([1, 2])
