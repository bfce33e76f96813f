"""The order of examples, whatever the batch does."""

from __future__ import annotations

import gc
import json
import multiprocessing
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.properties import with_examples
from torch.utils.data import Dataset, IterableDataset

from adabatch.batch.plan import BatchPlan
from adabatch.runtime.data import BlockShuffle, GlobalOrder, ScatteredShuffle, WeightedShuffle

RUNS_WITH_PROCESSES = 40
"""As many as fit into half a minute of one core."""


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
    """The definition in the docstring, place by place."""
    n = len(order)
    epochs = {epoch: order.permutation(epoch).tolist() for epoch in range(begin // n, end // n + 1)}
    return [epochs[g // n][g % n] for g in range(begin, end)]


def deal(orders: list[GlobalOrder], feeds: list[Any], plan: BatchPlan) -> list[list[list[int]]]:
    """One step on all ranks: the micro-batches of each."""
    portions = [feed.take(plan) for feed in feeds]
    micro_batches = [[batch.tolist() for batch in portion.batches] for portion in portions]
    for feed, portion, batches in zip(feeds, portions, micro_batches, strict=True):
        assert list(portion.sizes) == [len(batch) for batch in batches]
        assert portion.num_examples == sum(portion.sizes) * len(orders)
        feed.consumed(portion)
    return micro_batches


class RunsAhead:
    """A loader that asks for up to ``most`` more micro-batches than it hands over, as loading processes do."""

    def __init__(self, dealer: Any, rng: random.Random, most: int) -> None:
        self._dealer, self._rng, self._most = dealer, rng, most

    def __iter__(self) -> Iterator[torch.Tensor]:
        asked: list[list[int]] = []
        for indices in self._dealer:
            asked.append(indices)
            while len(asked) > self._rng.randint(0, self._most):
                yield torch.tensor(asked.pop(0))


def ahead(order: GlobalOrder, rng: random.Random) -> GlobalOrder:
    """The order with such a loader: thousands of cases would start too many processes."""
    order._loader = lambda dealer, seeds: RunsAhead(dealer, rng, rng.randint(0, 5))  # type: ignore
    return order


def break_off(feeds: list[Any], plan: BatchPlan, rng: random.Random) -> None:
    """A step that every rank leaves in its middle, each at a point of its own."""
    for feed in feeds:
        portion = feed.take(plan)
        for _ in zip(range(rng.randint(0, len(portion.sizes))), portion.batches, strict=False):
            pass


def interleaved(micro_batches: list[list[list[int]]]) -> list[int]:
    """All ranks' examples as they stand in the order: micro-batch by micro-batch, rank after rank."""
    return [example for together in zip(*micro_batches, strict=True) for batch in together for example in batch]


def check_run(
    ordered: Callable[[], GlobalOrder],
    taking_part: list[int],
    run: list[tuple[int, list[tuple[int, int]]]],
    rng: random.Random,
    *,
    join_epochs: bool,
) -> None:
    """That each epoch of a run holds each example once, in the order that one process without a break would take.

    Args:
        ordered: makes the order of a rank, each time with loading processes or another loader as it likes.
        taking_part: the examples, ascending.
        run: stretches of a number of ranks and their steps, each a micro-batch size and accumulation steps. Between the
            stretches the run is saved, and loaded on the ranks of the next.
        rng: says which steps are broken off, and taken again.
        join_epochs: as the order has it.
    """
    dealt: list[int] = []
    saved = None
    for dp_size, steps in run:
        orders = [ordered() for _ in range(dp_size)]
        if saved is not None:
            for order in orders:
                order.load_state_dict(json.loads(saved))
        feeds = [order.feed(rank, dp_size) for rank, order in enumerate(orders)]
        for micro, accumulation in steps:
            if rng.random() < 0.2:
                break_off(feeds, plan_of(rng.randint(1, 9), rng.randint(1, 4), dp_size), rng)
            step = interleaved(deal(orders, feeds, plan_of(micro, accumulation, dp_size)))
            left = len(taking_part) - len(dealt) % len(taking_part)
            whole = micro * accumulation * dp_size
            assert len(step) == (whole if join_epochs else min(whole, -(-left // dp_size) * dp_size))
            dealt += step
        (saved,) = {json.dumps(order.state_dict()) for order in orders}
        assert orders[0].epoch * len(taking_part) + orders[0].examples_seen == len(dealt)
    assert dealt == expected(ordered(), 0, len(dealt))
    for begin in range(0, len(dealt) - len(taking_part) + 1, len(taking_part)):
        assert sorted(dealt[begin : begin + len(taking_part)]) == taking_part


# --- GlobalOrder ----------------------------------------------------------------------------------------------------

steps_of_a_run = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 3)), min_size=1, max_size=5)
stretches = st.lists(st.tuples(st.integers(1, 4), steps_of_a_run), min_size=1, max_size=4)
shuffles = st.sampled_from(
    [True, False, ScatteredShuffle(), BlockShuffle(size=3, mixed=2), BlockShuffle(size=1, mixed=1)]
)


@with_examples(200)
@given(
    num_examples=st.integers(1, 40),
    seed=st.integers(0, 2**40),
    shuffle=shuffles,
    subset=st.sampled_from([None, range(0, 10**6, 3), "some"]),
    join_epochs=st.booleans(),
    run=stretches,
)
@pytest.mark.slow
def test_every_example_comes_once_an_epoch_in_one_order_whatever_happens(
    num_examples: int,
    seed: int,
    shuffle: Any,
    subset: Any,
    join_epochs: bool,
    run: list[tuple[int, list[tuple[int, int]]]],
) -> None:
    """Sizes, ranks, loading processes that run ahead, saves and loads, steps that are broken off and taken again."""
    taking_part = range(0, num_examples, 3) if subset is not None else range(num_examples)
    chosen = None if subset is None else list(taking_part) if subset == "some" else taking_part
    rng = random.Random(seed)

    def ordered() -> GlobalOrder:
        options = {"shuffle": shuffle, "subset": chosen, "join_epochs": join_epochs}
        return ahead(GlobalOrder(Numbers(num_examples), seed=seed, **options), rng)

    check_run(ordered, list(taking_part), run, rng, join_epochs=join_epochs)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more processes than this machine has cores
@pytest.mark.parametrize("seed", range(RUNS_WITH_PROCESSES))
@pytest.mark.slow
def test_with_real_loading_processes_too(seed: int) -> None:
    """The same as above with 0 to 3 of them a rank, another number after each load, and runs of several epochs."""
    rng = random.Random(seed)
    num_examples, join_epochs = rng.randint(1, 40), rng.random() < 0.6
    shuffle = rng.choice([True, False, ScatteredShuffle(), BlockShuffle(size=3, mixed=2)])

    def ordered() -> GlobalOrder:
        num_workers = rng.randint(0, 3)
        running = {"prefetch_factor": rng.randint(1, 4), "persistent_workers": rng.random() < 0.5}
        return GlobalOrder(
            Numbers(num_examples),
            seed=seed,
            shuffle=shuffle,
            join_epochs=join_epochs,
            num_workers=num_workers,
            **(running if num_workers else {}),
        )

    run = [
        (rng.randint(1, 3), [(rng.randint(1, 6), rng.randint(1, 3)) for _ in range(rng.randint(1, 6))])
        for _ in range(rng.randint(2, 3))
    ]
    check_run(ordered, list(range(num_examples)), run, rng, join_epochs=join_epochs)
    gc.collect()
    assert not multiprocessing.active_children()


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
    assert (order.epoch, order.examples_seen) == (0, 0)
    again = order.feed(0, 1)  # the pass was broken off: the step comes again
    assert interleaved(deal([order], [again], plan_of(2, 2))) == expected(order, 0, 4)
    state = {"format": 2, "seed": 3, "epoch": 0, "examples": 4, "length": 10, "order": "full shuffle"}
    assert order.state_dict() == state


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


def test_steps_with_workers_are_those_without() -> None:
    """What is under way in another size when the plan changes is dealt anew; nothing is lost, nothing comes twice."""
    dp_size, num_examples = 2, 64
    plans = [(2, 1), (2, 2), (4, 1), (8, 1), (8, 2), (16, 1), (16, 1), (3, 2), (16, 2), (4, 2), (2, 1)]

    def run(**options: Any) -> list[list[list[list[int]]]]:
        orders = [GlobalOrder(Numbers(num_examples), seed=9, **options) for _ in range(dp_size)]
        feeds = [order.feed(rank, dp_size) for rank, order in enumerate(orders)]
        return [deal(orders, feeds, plan_of(micro, accumulation, dp_size)) for micro, accumulation in plans]

    plain = run()
    assert [[len(batch) for batch in step[0]] for step in plain] == [[micro] * count for micro, count in plans]
    for options in ({"num_workers": 1}, {"num_workers": 2, "prefetch_factor": 3, "persistent_workers": True}):
        assert run(**options) == plain
    gc.collect()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_shorter_last_step_ends_an_epoch_on_request(num_workers: int) -> None:
    order = GlobalOrder(Numbers(10), join_epochs=False, num_workers=num_workers)
    feed = order.feed(0, 1)
    sizes = []
    for plan in [plan_of(4, 1)] * 4 + [plan_of(3, 2)] * 3 + [plan_of(5, 2)]:
        sizes.append([len(batch) for batch in deal([order], [feed], plan)[0]])
    assert sizes == [[4], [4], [2], [4], [3, 3], [3, 3], [3, 1], [5, 5]]
    assert (order.epoch, order.examples_seen) == (4, 0)


def test_what_ranks_cannot_share_equally_is_filled_up_from_the_next_epoch() -> None:
    orders = [GlobalOrder(Numbers(10), join_epochs=False) for _ in range(4)]
    feeds = [order.feed(rank, 4) for rank, order in enumerate(orders)]
    plan = plan_of(2, 2, 4)
    steps = [interleaved(deal(orders, feeds, plan)) for _ in range(2)]
    assert [len(step) for step in steps] == [12, 8]
    assert (orders[0].epoch, orders[0].examples_seen) == (2, 0)
    assert steps[0] + steps[1] == expected(orders[0], 0, 20)


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


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"seed": -1}, ValueError, "seed must be from 0 to 18446744073709551615, got -1"),
        ({"seed": 2**64}, ValueError, "seed must be a whole number, up to 18446744073709551615"),
        ({"seed": 0.5}, TypeError, "seed must be a whole number, got 0.5"),
        ({"seed": "0"}, TypeError, "seed must be a whole number, got '0'"),
        ({"seed": True}, TypeError, "seed must be a whole number, got True"),
        ({"num_workers": -1}, ValueError, r"num_workers must be from 0 to 1024 \(processes per rank\), got -1"),
        ({"num_workers": 10**9}, ValueError, "num_workers must be from 0 to 1024 .*, got 1000000000"),
        ({"num_workers": 2.0}, TypeError, "num_workers must be a whole number, got 2.0"),
        ({"num_workers": None}, TypeError, "num_workers must be a whole number, got None"),
        ({"join_epochs": "no"}, TypeError, "join_epochs must be True or False, got 'no'"),
        ({"subset": [0.5, 1.5]}, TypeError, "subset must be whole numbers of examples, .*float64"),
        ({"subset": [True, False, True, False]}, TypeError, "for a mask give numpy.flatnonzero"),
        ({"subset": [[0, 1]]}, TypeError, r"of shape \(1, 2\)"),
    ],
    ids=str,
)
def test_numbers_that_cannot_be_are_refused(options: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        GlobalOrder(Numbers(4), **options)


def test_whole_numbers_of_numpy_and_torch_are_numbers() -> None:
    order = GlobalOrder(Numbers(4), seed=np.int64(3), num_workers=np.int32(0), subset=torch.tensor([2, 0]))
    assert order.state_dict()["seed"] == 3
    assert type(order.state_dict()["seed"]) is int
    assert sorted(order.permutation(0).tolist()) == [0, 2]


def test_a_seed_of_64_bits_serves() -> None:
    order = GlobalOrder(Numbers(4), seed=2**64 - 1)
    dealt = interleaved(deal([order], [order.feed(0, 1)], plan_of(2, 2)))
    assert sorted(dealt) == [0, 1, 2, 3]


@pytest.mark.parametrize("dataset", [SizedStream(), iter(range(8)), Dataset()], ids=lambda d: type(d).__name__)
def test_a_data_set_that_cannot_be_indexed_is_refused(dataset: Any) -> None:
    with pytest.raises(TypeError, match=r"map-style data set with a length.*DataLoader of its own"):
        GlobalOrder(dataset)


def test_a_state_of_the_first_format_is_read() -> None:
    order = GlobalOrder(Numbers(10), seed=3)
    order.load_state_dict({"format": 1, "seed": 5, "epoch": 2, "examples": 7})
    assert (order.seed, order.epoch, order.examples_seen) == (5, 2, 7)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"dataset": Numbers(9)}, "saved with length 10, now 9"),
        ({"shuffle": False}, "saved with order 'full shuffle', now 'in order'"),
        ({"shuffle": ScatteredShuffle()}, "now 'scattered shuffle'"),
        ({"shuffle": BlockShuffle(size=4, mixed=2)}, "now 'shuffle of blocks of 4, 2 mixed'"),
        ({"shuffle": WeightedShuffle([1.0] * 10)}, "now '10 draws with replacement, weights [0-9a-f]{12}'"),
        ({"subset": range(2, 8)}, r"now 'full shuffle of range\(2, 8\)'"),
        ({"subset": [1, 2]}, r"now 'full shuffle of subset [0-9a-f]{12}'"),
        ({"dataset": Numbers(9), "shuffle": False}, "length 10, now 9 and order 'full shuffle', now 'in order'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_place_in_another_order_is_refused_by_name_with_a_way_out(other: dict[str, Any], words: str) -> None:
    saved = GlobalOrder(Numbers(10), seed=3)
    saved.start_epoch(4)
    order = GlobalOrder(**{"dataset": Numbers(10), **other})
    with pytest.raises(ValueError, match=rf"{words}.*start_epoch\(5\)"):
        order.load_state_dict(saved.state_dict())
    assert (order.seed, order.epoch, order.examples_seen) == (0, 0, 0)
    order.start_epoch(5)
    assert interleaved(deal([order], [order.feed(0, 1)], plan_of(2, 1))) == expected(
        order, 5 * len(order), 5 * len(order) + 2
    )


def test_a_state_from_the_future_or_outside_the_epoch_is_refused() -> None:
    order = GlobalOrder(Numbers(4))
    with pytest.raises(ValueError, match=r"format 3.*upgrade adabatch"):
        order.load_state_dict({"format": 3, "seed": 0, "epoch": 0, "examples": 0})
    for examples in (-1, 4):
        with pytest.raises(ValueError, match=f"example {examples} of an epoch, which has only 4"):
            order.load_state_dict({"format": 1, "seed": 0, "epoch": 0, "examples": examples})
    with pytest.raises(ValueError, match="epoch must be from 0 to 2147483647, got -1"):
        order.start_epoch(-1)
    assert (order.epoch, order.examples_seen) == (0, 0)


@pytest.mark.parametrize(
    ("subset", "words"),
    [
        ([], "the subset is empty"),
        (range(0), "the subset is empty"),
        ([0, 3, 0], "an example twice"),
        ([0, 4], "from example 0 to 4, but the data set has 0 to 3"),
        (range(3, -2, -1), "from example -1 to 3"),
    ],
    ids=str,
)
def test_a_subset_that_the_data_set_does_not_have_is_refused(subset: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GlobalOrder(Numbers(4), subset=subset)


def test_what_is_no_shuffle_is_refused() -> None:
    for wrong in ("blocks", ScatteredShuffle, None):
        with pytest.raises(TypeError, match="shuffle must be True, False or a shuffle"):
            GlobalOrder(Numbers(4), shuffle=wrong)  # type: ignore[arg-type]


def test_weights_decide_how_often_examples_come_and_how_long_an_epoch_is() -> None:
    order = GlobalOrder(Numbers(4), shuffle=WeightedShuffle([0, 1, 0, 3], length=1000), join_epochs=False)
    assert len(order) == 1000
    feed = order.feed(0, 1)
    dealt = interleaved(deal([order], [feed], plan_of(400, 3)))
    assert len(dealt) == 1000
    assert order.epoch == 1
    assert set(dealt) == {1, 3}
    assert abs(dealt.count(3) - 750) < 5 * (1000 * 0.75 * 0.25) ** 0.5
    with pytest.raises(ValueError, match="4 weights were given for 5 examples"):
        GlobalOrder(Numbers(5), shuffle=WeightedShuffle([0, 1, 0, 3]))
