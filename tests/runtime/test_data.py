"""The order of examples, whatever the batch does; and steps from loaders that know nothing of adabatch."""

from __future__ import annotations

import gc
import json
import multiprocessing
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from adabatch.batch.plan import BatchPlan
from adabatch.runtime.collectives import Collectives
from adabatch.runtime.data import GlobalOrder, LoaderFeed, num_examples_in


class Numbers(Dataset[int]):
    """Example i is the number i."""

    def __init__(self, num_examples: int) -> None:
        self.num_examples = num_examples

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, index: int) -> int:
        return index


class Noisy(Numbers):
    """Example i comes with a random draw, as an augmented image does."""

    def __getitem__(self, index: int) -> tuple[int, float]:
        return index, float(torch.rand(()))


class SizedStream(IterableDataset[int]):
    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[int]:
        return iter(range(8))


def plan_of(micro: int, accumulation: int, dp_size: int = 1) -> BatchPlan:
    return BatchPlan(micro_batch_size=micro, accumulation_steps=accumulation, dp_size=dp_size)


def expected(order: GlobalOrder, begin: int, end: int) -> list[int]:
    """The definition in the docstring, position by position."""
    n = len(order)
    return [int(order.permutation(g // n)[g % n]) for g in range(begin, end)]


def deal(orders: list[GlobalOrder], feeds: list[Any], plan: BatchPlan) -> list[list[list[int]]]:
    """One step on all ranks: the micro-batches of each."""
    portions = [feed.take(plan) for feed in feeds]
    micro_batches = [[batch.tolist() for batch in portion.batches] for portion in portions]
    for feed, portion, batches in zip(feeds, portions, micro_batches, strict=True):
        assert list(portion.sizes) == [len(batch) for batch in batches]
        assert portion.num_examples == sum(portion.sizes) * len(orders)
        feed.consumed(portion)
    return micro_batches


def interleaved(micro_batches: list[list[list[int]]]) -> list[int]:
    """All ranks' examples as they stand in the order: micro-batch by micro-batch, rank after rank."""
    return [example for together in zip(*micro_batches, strict=True) for batch in together for example in batch]


# --- GlobalOrder ----------------------------------------------------------------------------------------------------

steps_of_a_run = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=8)
stretches = st.lists(st.tuples(st.integers(1, 4), steps_of_a_run), min_size=1, max_size=4)


@settings(deadline=None)
@given(num_examples=st.integers(1, 40), seed=st.integers(0, 2**40), shuffle=st.booleans(), run=stretches)
def test_every_example_comes_once_an_epoch_in_one_order_whatever_the_batch_and_world_size_did(
    num_examples: int, seed: int, shuffle: bool, run: list[tuple[int, list[tuple[int, int]]]]
) -> None:
    dealt: list[int] = []
    saved = None
    for dp_size, steps in run:  # between the stretches: a save, and a load on another number of ranks
        orders = [GlobalOrder(Numbers(num_examples), seed=seed, shuffle=shuffle) for _ in range(dp_size)]
        if saved is not None:
            for order in orders:
                order.load_state_dict(json.loads(saved))
        feeds = [order.feed(rank, dp_size) for rank, order in enumerate(orders)]
        for micro, accumulation in steps:
            dealt += interleaved(deal(orders, feeds, plan_of(micro, accumulation, dp_size)))
        (saved,) = {json.dumps(order.state_dict()) for order in orders}
        assert orders[0].epoch * num_examples + orders[0].examples_seen == len(dealt)
    reference = GlobalOrder(Numbers(num_examples), seed=seed, shuffle=shuffle)
    assert dealt == expected(reference, 0, len(dealt))
    for begin in range(0, len(dealt) - num_examples + 1, num_examples):
        assert sorted(dealt[begin : begin + num_examples]) == list(range(num_examples))


@settings(deadline=None)
@given(num_examples=st.integers(1, 300), seed=st.integers(0, 2**62), epoch=st.integers(0, 2**31))
def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch_alone(
    num_examples: int, seed: int, epoch: int
) -> None:
    first = GlobalOrder(Numbers(num_examples), seed=seed).permutation(epoch)
    torch.rand(3)
    second = GlobalOrder(Numbers(num_examples), seed=seed).permutation(epoch)
    assert torch.equal(first, second)
    assert sorted(first.tolist()) == list(range(num_examples))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {
        tuple(GlobalOrder(Numbers(50), seed=seed).permutation(epoch).tolist())
        for seed in range(20)
        for epoch in range(20)
    }
    assert len(orders) == 400


def test_without_shuffling_the_data_sets_own_order_comes() -> None:
    order = GlobalOrder(Numbers(5), shuffle=False)
    feed = order.feed(0, 1)
    assert deal([order], [feed], plan_of(7, 1)) == [[[0, 1, 2, 3, 4, 0, 1]]]


def test_the_place_moves_only_when_a_step_is_over() -> None:
    order = GlobalOrder(Numbers(10), seed=3)
    feed = order.feed(0, 1)
    portion = feed.take(plan_of(2, 2))
    next(iter(portion.batches))
    assert order.state_dict() == {"format": 1, "seed": 3, "epoch": 0, "examples": 0}
    again = order.feed(0, 1)  # the pass was broken off: the step comes again
    assert interleaved(deal([order], [again], plan_of(2, 2))) == expected(order, 0, 4)
    assert order.state_dict() == {"format": 1, "seed": 3, "epoch": 0, "examples": 4}


def test_a_state_loaded_in_the_middle_of_a_pass_is_where_the_next_step_begins() -> None:
    order = GlobalOrder(Numbers(10), seed=3)
    feed = order.feed(0, 1)
    deal([order], [feed], plan_of(2, 2))
    order.load_state_dict({"format": 1, "seed": 5, "epoch": 2, "examples": 7})
    dealt = interleaved(deal([order], [feed], plan_of(2, 2)))
    assert dealt == expected(GlobalOrder(Numbers(10), seed=5), 27, 31)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_global_random_state_is_left_alone(num_workers: int) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    order = GlobalOrder(Numbers(8), num_workers=num_workers)
    deal([order], [order.feed(0, 1)], plan_of(2, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_with_workers_a_growing_micro_batch_loses_and_repeats_nothing() -> None:
    """What is under way when the size changes arrives first; what arrives is what is counted."""
    dp_size, num_examples = 2, 64
    orders = [GlobalOrder(Numbers(num_examples), seed=9, num_workers=2, prefetch_factor=2) for _ in range(dp_size)]
    feeds = [order.feed(rank, dp_size) for rank, order in enumerate(orders)]
    dealt: list[int] = []
    sizes = []
    for micro, accumulation in [(2, 1), (2, 2), (4, 1), (8, 1), (8, 2), (16, 1), (16, 1), (16, 2), (4, 2), (2, 1)]:
        step = deal(orders, feeds, plan_of(micro, accumulation, dp_size))
        assert [len(batch) for batch in step[0]] == [len(batch) for batch in step[1]]
        count = sum(map(len, step[0]))
        assert micro * accumulation <= count < micro * accumulation + 16  # over by less than the largest under way
        sizes += [len(batch) for batch in step[0]]
        dealt += interleaved(step)
    assert 16 in sizes
    assert len(dealt) == 2 * sum(sizes) == orders[0].epoch * num_examples + orders[0].examples_seen
    assert dealt == expected(orders[0], 0, len(dealt))
    counts = Counter(dealt)
    assert max(counts.values()) - min(counts[i] for i in range(num_examples)) <= 1
    del feeds
    gc.collect()
    assert not multiprocessing.active_children()


def test_with_workers_the_size_under_way_is_used_up_before_the_new_one_comes() -> None:
    order = GlobalOrder(Numbers(100), num_workers=2, prefetch_factor=1)
    feed = order.feed(0, 1)
    sizes = []
    for plan in (plan_of(2, 1), plan_of(8, 1), plan_of(8, 1)):
        portion = feed.take(plan)
        assert [len(batch) for batch in portion.batches] == portion.sizes
        feed.consumed(portion)
        sizes.append(list(portion.sizes))
    assert sizes[0] == [2]
    assert sizes[1][0] == 2  # was on its way
    assert sizes[2] == [8]


def draws(order: GlobalOrder, rank: int) -> tuple[float, ...]:
    """What augmentation draws on one rank in the next step."""
    feed = order.feed(rank, 2)
    portion = feed.take(plan_of(4, 1, 2))
    found = tuple(draw for batch in portion.batches for draw in batch[1].tolist())
    feed.consumed(portion)
    return found


def test_workers_draw_anew_on_every_rank_and_in_every_pass_and_the_same_in_every_run() -> None:
    """A fixed seed for the loader gave all ranks, in all passes, the same random numbers."""

    def run() -> list[tuple[float, ...]]:
        orders = [GlobalOrder(Noisy(32), seed=3, num_workers=1) for _ in range(2)]
        return [draws(order, rank) for _ in range(2) for rank, order in enumerate(orders)]

    first = run()
    assert len(set(first)) == 4
    assert run() == first


@pytest.mark.parametrize("option", ["batch_size", "sampler", "batch_sampler", "drop_last", "generator", "in_order"])
def test_options_that_would_order_the_data_anew_are_refused(option: str) -> None:
    options: dict[str, Any] = {option: None}
    with pytest.raises(ValueError, match=f"GlobalOrder itself decides {option}"):
        GlobalOrder(Numbers(4), **options)


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match="data set Numbers is empty"):
        GlobalOrder(Numbers(0))


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="seed must not be negative, got -1"):
        GlobalOrder(Numbers(4), seed=-1)


def test_a_seed_of_any_size_serves() -> None:
    order = GlobalOrder(Numbers(4), seed=2**80 + 1)
    dealt = interleaved(deal([order], [order.feed(0, 1)], plan_of(2, 2)))
    assert sorted(dealt) == [0, 1, 2, 3]


@pytest.mark.parametrize("dataset", [SizedStream(), iter(range(8)), Dataset()], ids=lambda d: type(d).__name__)
def test_a_data_set_that_cannot_be_indexed_is_refused(dataset: Any) -> None:
    with pytest.raises(TypeError, match=r"map-style data set with a length.*DataLoader of its own"):
        GlobalOrder(dataset)


def test_a_state_from_the_future_or_from_a_larger_data_set_is_refused() -> None:
    order = GlobalOrder(Numbers(4))
    with pytest.raises(ValueError, match=r"format 2.*upgrade adabatch"):
        order.load_state_dict({"format": 2, "seed": 0, "epoch": 0, "examples": 0})
    with pytest.raises(ValueError, match=r"example 4 of its epoch.*only 4"):
        order.load_state_dict({"format": 1, "seed": 0, "epoch": 0, "examples": 4})
    assert order.state_dict() == {"format": 1, "seed": 0, "epoch": 0, "examples": 0}


# --- LoaderFeed -----------------------------------------------------------------------------------------------------


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
