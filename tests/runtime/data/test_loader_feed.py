"""Steps from loaders that know nothing of adabatch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from adabatch.batch.plan import BatchPlan
from adabatch.runtime.collectives import Collectives
from adabatch.runtime.data import LoaderFeed


def plan_of(micro: int, accumulation: int) -> BatchPlan:
    return BatchPlan(micro_batch_size=micro, accumulation_steps=accumulation, dp_size=1)


def loader_feed(batches: Any, **options: Any) -> LoaderFeed:
    return LoaderFeed(batches, Collectives(), **options)


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


# --- one iterator a pass ------------------------------------------------------------------------------------------


class RestartsItself:
    """As DeepSpeed's own loader: ``iter()`` begins a new pass and returns the loader, which goes on after its end."""

    def __init__(self, num_batches: int) -> None:
        self.num_batches = num_batches
        self.num_passes = 0
        self.place = num_batches

    def __iter__(self) -> RestartsItself:
        self.num_passes += 1
        self.place = 0
        return self

    def __next__(self) -> Any:
        if self.place == self.num_batches:
            self.place = 0  # an iterator that comes back to life after its end
            raise StopIteration
        self.place += 1
        return torch.full((2,), self.place - 1)


def taken(feed: LoaderFeed, *accumulations: int, micro: int = 2) -> list[list[int] | None]:
    """The first number of each micro-batch of each step; None where the pass is over."""
    portions = [feed.take(plan_of(micro, accumulation)) for accumulation in accumulations]
    return [None if one is None else [int(batch[0]) for batch in one.batches] for one in portions]


@pytest.mark.parametrize("kind", ["restarts", "generator", "iterator", "list", "stream", "getitem"])
def test_a_pass_goes_on_from_step_to_step_and_ends_once(kind: str) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(torch.arange(5).repeat_interleave(2))

    class Indexed:
        def __getitem__(self, index: int) -> Any:
            if index == 5:
                raise IndexError
            return torch.full((2,), index)

    batches = [torch.full((2,), number) for number in range(5)]
    loaders: dict[str, Any] = {
        "restarts": RestartsItself(5),
        "generator": (batch for batch in batches),
        "iterator": iter(batches),
        "list": batches,
        "stream": DataLoader(Stream(), batch_size=2),
        "getitem": Indexed(),
    }
    assert taken(loader_feed(loaders[kind]), 2, 1, 2, 1, 1) == [[0, 1], [2], [3, 4], None, None]


def test_a_pass_begins_once() -> None:
    loader = RestartsItself(5)
    taken(loader_feed(loader), 2, 2, 2, 2)
    assert loader.num_passes == 1
    assert taken(loader_feed(loader), 2) == [[0, 1]]
    assert loader.num_passes == 2


def test_an_iterator_at_its_end_says_that_it_is_one() -> None:
    loader = iter([torch.zeros(2)])
    feed = loader_feed(loader)
    assert feed.take(plan_of(2, 1)).sizes == [2]
    assert feed.take(plan_of(2, 1)) is None
    with pytest.raises(ValueError, match=r"list_iterator is an iterator, which can be passed over only once"):
        loader_feed(loader).take(plan_of(2, 1))


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        (5, "an iterable of micro-batches, such as a DataLoader, got 5"),
        (None, "got None"),
        ("data", "got 'data'"),
        ({"train": []}, "got {'train': "),
        (TensorDataset(torch.zeros(8, 3)), r"a TensorDataset is a data set: give GlobalOrder\(dataset\)"),
    ],
    ids=["number", "None", "text", "mapping", "data set"],
)
def test_what_is_no_loader(loader: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        loader_feed(loader)


# --- what is counted is examples ----------------------------------------------------------------------------------


def test_time_major_micro_batches_ask_for_a_count_before_a_step_is_made_of_them() -> None:
    batches = [torch.zeros(5, 8, 3)] * 4  # 5 times, 8 examples
    with pytest.raises(ValueError, match=r"micro-batch of 5 examples .*\(5, 8, 3\).*micro_batch_size=8.*pass count="):
        loader_feed(batches).take(plan_of(8, 1))
    assert loader_feed(batches, count=lambda batch: batch.shape[1]).take(plan_of(8, 1)).sizes == [8]


def test_more_than_a_micro_batch_is_refused_also_where_the_step_has_room() -> None:
    for options in ({}, {"count": len}):
        with pytest.raises(ValueError, match=r"micro-batch of 6 examples came .* but micro_batch_size=4"):
            loader_feed([torch.zeros(6), torch.zeros(2)], **options).take(plan_of(4, 2))


def test_a_smaller_micro_batch_is_the_last_one() -> None:
    for batches in ([4, 3, 4], [3, 4, 4], [4, 3, 3]):
        feed = loader_feed([torch.zeros(size) for size in batches])
        with pytest.raises(ValueError, match=r"micro-batch of 3 examples came before the last one of a pass"):
            taken(feed, 1, 1, 1, micro=4)
    feed = loader_feed([torch.zeros(3)])
    assert feed.take(plan_of(4, 2)).sizes == [3]
    assert feed.take(plan_of(4, 2)) is None


def test_micro_batches_that_vary_are_counted_by_their_user() -> None:
    feed = loader_feed([torch.zeros(size) for size in (3, 4, 2, 4)], count=len)
    assert feed.take(plan_of(4, 4)).sizes == [3, 4, 2, 4]


class Numbers(IterableDataset[Any]):
    """0 to 6, each from one of two loading processes."""

    def __iter__(self) -> Any:
        info = torch.utils.data.get_worker_info()
        return iter(range(7) if info is None else range(info.id, 7, info.num_workers))


def test_each_loading_process_of_a_stream_has_a_last_micro_batch() -> None:
    """Four and three numbers: 3, 3, and then what is left of either."""
    feed = loader_feed(DataLoader(Numbers(), batch_size=3, num_workers=2))
    portions = [feed.take(plan_of(3, 1)) for _ in range(4)]
    assert sorted(portion.sizes[0] for portion in portions if portion is not None) == [1, 3, 3]
    assert portions[-1] is None


@pytest.mark.parametrize(("count", "shown"), [(2.5, "2.5"), ("two", "'two'"), (None, "None")])
def test_a_count_is_a_whole_number(count: Any, shown: str) -> None:
    with pytest.raises(TypeError, match=rf"count= must give a whole number of examples, got {shown}"):
        loader_feed([torch.zeros(2)], count=lambda batch: count).take(plan_of(2, 1))


def test_numbers_of_torch_are_counts() -> None:
    feed = loader_feed([torch.ones(2)], count=lambda batch: batch.sum().long())
    assert feed.take(plan_of(2, 1)).sizes == [2]


# --- memory that is used again ----------------------------------------------------------------------------------------


class Refills:
    """Gives ``num_buffers`` tensors in turn, each filled again, by torch or where torch does not see it."""

    def __init__(self, num_buffers: int, *, unwatched: bool) -> None:
        self.arrays = [np.zeros(2, np.float32) for _ in range(num_buffers)]
        self.tensors = [torch.from_numpy(array) for array in self.arrays]
        self.unwatched = unwatched

    def __iter__(self) -> Any:
        for number in range(12):
            place = number % len(self.arrays)
            if self.unwatched:
                self.arrays[place][:] = (number, -number)
            else:
                self.tensors[place].copy_(torch.tensor([number, -number]))
            yield {"x": self.tensors[place]}


@pytest.mark.parametrize("unwatched", [False, True])
def test_a_loader_that_fills_memory_again_is_told_so(unwatched: bool) -> None:
    with pytest.raises(
        ValueError, match=r"the loader changed a micro-batch after it yielded it.* \(tensor\.clone\(\)\)"
    ):
        loader_feed(Refills(1, unwatched=unwatched)).take(plan_of(2, 3))
    feed = loader_feed(Refills(2, unwatched=unwatched))
    for _ in range(2):  # enough buffers until the step holds more
        assert len(feed.take(plan_of(2, 2)).batches) == 2
    with pytest.raises(ValueError, match="all 3 micro-batches of a step are fetched before it begins"):
        feed.take(plan_of(2, 3))
    assert len(loader_feed([torch.ones(2)] * 4).take(plan_of(2, 4)).batches) == 4  # the same one, by intent
