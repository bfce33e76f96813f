"""A step's micro-batches shared by ranks that come and go: ``GlobalOrder.shared_feed``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.properties import with_examples

from adabatch import GlobalOrder
from adabatch.batch.plan import BatchPlan
from adabatch.runtime.collectives import Collectives


def plan_of(micro: int, count: int) -> BatchPlan:
    return BatchPlan(micro_batch_size=micro, accumulation_steps=count, dp_size=1)


def ranks_at(rank: int, size: int) -> Collectives:
    ranks = Collectives(reducer=lambda values, op: values)
    ranks.stand_at(rank, size)
    return ranks


def order_of(length: int, **options: Any) -> GlobalOrder:
    return GlobalOrder(torch.arange(length), seed=1, **options)  # type: ignore[arg-type]


def sequence(order: GlobalOrder, count: int) -> list[int]:
    epochs = -(-count // len(order)) + 1
    return torch.cat([order.permutation(epoch) for epoch in range(epochs)]).tolist()[:count]


def taken(portion: Any) -> list[int]:
    return [number for batch in portion.batches for number in batch.tolist()]


STEPS = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 5), st.booleans()), max_size=12)


@with_examples(60)
@given(steps=STEPS)
def test_every_step_is_its_plan_whoever_is_there(steps: list[tuple[int, int, int, bool]]) -> None:
    """Over changes of plan and ranks, and steps that are taken again, each place of the order is taken once."""
    orders = [order_of(97) for _ in range(5)]
    ranks = [ranks_at(0, 1) for _ in orders]
    feeds = [order.shared_feed(each) for order, each in zip(orders, ranks, strict=True)]
    dealt: list[int] = []
    for micro, count, size, fails in steps:
        plan = plan_of(micro, max(count, -(-size // micro)))
        for rank in range(size):
            ranks[rank].stand_at(rank, size)
        if fails:  # some of it is taken, and it does not count
            next(iter(feeds[0].take(plan).batches))
        portions = [feed.take(plan) for feed in feeds[:size]]
        numbers = [taken(portion) for portion in portions]
        assert {portion.num_examples for portion in portions} == {plan.global_batch_size}
        assert all(sum(portion.sizes) == len(found) for portion, found in zip(portions, numbers, strict=True))
        assert all(1 <= min(portion.sizes) <= max(portion.sizes) <= micro for portion in portions)
        counts = [len(portion.sizes) for portion in portions]
        assert max(counts) - min(counts) <= 1
        dealt += [number for found in numbers for number in found]
        for feed, portion in zip(feeds[:size], portions, strict=True):
            feed.consumed(portion)
        for order in orders[size:]:  # those that were not there get the state when they come
            order.load_state_dict(orders[0].state_dict())
    assert dealt == sequence(order_of(97), len(dealt))


def test_loading_processes_prepare_the_next_steps_and_start_again_when_ranks_change() -> None:
    ranks = ranks_at(1, 2)
    order = order_of(64, num_workers=1)
    feed = order.shared_feed(ranks)
    expected = sequence(order, 64)
    for begin, rank, size, own in (
        (0, 1, 2, (8, 12)),
        (12, 1, 2, (20, 24)),
        (24, 1, 3, (28, 32)),
        (36, 0, 1, (36, 48)),
    ):
        ranks.stand_at(rank, size)
        portion = feed.take(plan_of(4, 3))
        assert taken(portion) == expected[own[0] : own[1]], begin
        feed.consumed(portion)


def test_epochs_that_are_not_joined_end_with_a_shorter_step() -> None:
    order = order_of(10, join_epochs=False)
    ranks = ranks_at(0, 3)
    feed = order.shared_feed(ranks)
    sizes = []
    for _ in range(4):
        portion = feed.take(plan_of(2, 4))
        taken(portion)
        feed.consumed(portion)
        sizes.append((portion.num_examples, list(portion.sizes)))
    # 8, the 2 that are left and one of the next epoch (there are 3 ranks), 8, and the one that is left with two more.
    assert sizes == [(8, [2, 2]), (3, [1]), (8, [2, 2]), (3, [1])]


def test_a_step_of_fewer_examples_than_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="a step of 2 examples cannot be shared by 3 ranks: raise the lower limit"):
        order_of(10).shared_feed(ranks_at(0, 3)).take(plan_of(1, 2))
