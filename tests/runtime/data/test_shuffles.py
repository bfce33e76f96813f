"""Orders of an epoch: permutations in constant memory, that mix; and draws by weight, against their definitions."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.properties import with_examples

from adabatch.runtime.data import BlockShuffle, FullShuffle, InOrder, ScatteredShuffle, WeightedShuffle
from adabatch.runtime.data.permutation import Permutation, key_of, uniforms
from adabatch.runtime.data.sequence import IN_MEMORY, ExampleSequence, shuffle_of

MILLIARD = 10**9
blocks = st.builds(BlockShuffle, size=st.integers(1, 40), mixed=st.integers(1, 12))
permuting = st.one_of(st.sampled_from([InOrder(), FullShuffle(), ScatteredShuffle()]), blocks)


def epoch_of(shuffle: Any, num_examples: int, *, seed: int = 0, epoch: int = 0) -> list[int]:
    return shuffle.epoch(num_examples, seed=seed, epoch=epoch)(0, shuffle.length(num_examples)).tolist()


@with_examples(200)
@given(num_examples=st.integers(1, 500), seed=st.integers(0, 2**70), epoch=st.integers(0, 2**40), shuffle=permuting)
def test_each_shuffle_permutes(num_examples: int, seed: int, epoch: int, shuffle: Any) -> None:
    assert sorted(epoch_of(shuffle, num_examples, seed=seed, epoch=epoch)) == list(range(num_examples))


@with_examples(200)
@given(data=st.data(), num_examples=st.integers(1, 500), seed=st.integers(0, 2**70), shuffle=permuting)
def test_any_stretch_of_an_epoch_is_that_of_the_whole(data: Any, num_examples: int, seed: int, shuffle: Any) -> None:
    begin = data.draw(st.integers(0, num_examples))
    end = data.draw(st.integers(begin, num_examples))
    order = shuffle.epoch(num_examples, seed=seed, epoch=3)
    assert order(begin, end).tolist() == epoch_of(shuffle, num_examples, seed=seed, epoch=3)[begin:end]


@with_examples(200)
@given(num_examples=st.integers(1, 500), seed=st.integers(0, 2**70), shuffle=blocks)
def test_blocks_are_read_in_windows_of_whole_blocks(num_examples: int, seed: int, shuffle: BlockShuffle) -> None:
    order = epoch_of(shuffle, num_examples, seed=seed)
    num_blocks = math.ceil(num_examples / shuffle.size)
    sizes = Counter(example // shuffle.size for example in range(num_examples))
    while order:
        read = list(dict.fromkeys(example // shuffle.size for example in order[: shuffle.size * shuffle.mixed]))
        window = sum(sizes[block] for block in read[: shuffle.mixed])
        blocks_read = {example // shuffle.size for example in order[:window]}
        assert len(blocks_read) == min(shuffle.mixed, num_blocks)
        assert window == sum(sizes[block] for block in blocks_read)
        order, num_blocks = order[window:], num_blocks - len(blocks_read)


@with_examples(200)
@given(size=st.integers(1, 2**40), key=st.integers(0, 2**64 - 1), data=st.data())
def test_a_permutation_and_its_inverse_undo_each_other(size: int, key: int, data: Any) -> None:
    places = np.array(data.draw(st.lists(st.integers(0, size - 1), max_size=20)), dtype=np.int64)
    permutation = Permutation(size, key=key)
    values = permutation(places)
    assert ((values >= 0) & (values < size)).all()
    assert permutation.inverse(values).tolist() == places.tolist()


@pytest.mark.parametrize("size", [3, 4, 5])
def test_all_permutations_of_a_small_set_are_about_equally_likely(size: int) -> None:
    num_orders, num_draws = math.factorial(size), 4000
    counts = Counter(tuple(epoch_of(ScatteredShuffle(), size, seed=seed)) for seed in range(num_draws))
    each = num_draws / num_orders
    statistic = sum((counts[order] - each) ** 2 / each for order in itertools.permutations(range(size)))
    freedom = num_orders - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)  # five standard deviations of chi-square


@pytest.mark.parametrize("shuffle", [ScatteredShuffle(), BlockShuffle(size=100, mixed=50)], ids=lambda s: s.name)
def test_a_large_permutation_mixes(shuffle: Any) -> None:
    """Against independence: where each example lands, and what follows it."""
    size = 10_007
    order = np.array(epoch_of(shuffle, size, seed=1))
    places = np.arange(size)
    assert abs(np.corrcoef(order, places)[0, 1]) < 5 / math.sqrt(size)
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 5 / math.sqrt(size)
    other = np.array(epoch_of(shuffle, size, seed=1, epoch=1))
    assert (order == other).sum() < 12  # one in expectation
    bits = (order[:, None] >> np.arange(13)) & 1  # each bit of what comes, in both halves of the epoch
    halves = bits[: size // 2].mean(axis=0) - bits[size // 2 :].mean(axis=0)
    assert (abs(halves) < 5 / math.sqrt(size)).all() or isinstance(shuffle, BlockShuffle)


@pytest.mark.parametrize("shuffle", [True, BlockShuffle(size=65_536, mixed=64)], ids=["scattered", "blocks"])
def test_a_milliard_examples_take_no_memory_and_any_place_is_reached_at_once(shuffle: Any) -> None:
    tracemalloc.start()
    try:
        sequence = ExampleSequence(MILLIARD, seed=7, shuffle=shuffle_of(shuffle, MILLIARD))
        found = [sequence.at(place, place + 1000) for place in (0, 123_456_789, MILLIARD - 500, 41 * MILLIARD + 17)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20
    for piece in found[:2]:
        assert len(set(piece.tolist())) == 1000
    assert all(((piece >= 0) & (piece < MILLIARD)).all() for piece in found)
    assert found[0].mean() == pytest.approx(MILLIARD / 2, rel=0.1) or isinstance(shuffle, BlockShuffle)


def test_shuffle_true_means_a_permutation_in_memory_as_long_as_that_is_small() -> None:
    assert shuffle_of(True, IN_MEMORY) == FullShuffle()
    assert shuffle_of(True, IN_MEMORY + 1) == ScatteredShuffle()
    assert shuffle_of(False, MILLIARD) == InOrder()


def test_the_orders_of_this_release_are_pinned() -> None:
    """A change here breaks the resume of every run that was saved before: it needs a new format of the state."""
    assert epoch_of(ScatteredShuffle(), 12, seed=3, epoch=1) == [2, 8, 1, 6, 9, 7, 0, 3, 4, 5, 10, 11]
    assert epoch_of(BlockShuffle(size=3, mixed=2), 11, seed=3, epoch=1) == [0, 10, 9, 1, 2, 5, 3, 6, 4, 8, 7]
    assert epoch_of(FullShuffle(), 12, seed=3, epoch=1) == [0, 7, 1, 3, 10, 11, 8, 6, 5, 4, 2, 9]
    weights = [1.0, 2.0, 3.0, 0.5]
    assert epoch_of(WeightedShuffle(weights), 4, seed=3, epoch=1) == [0, 2, 3, 1]
    assert epoch_of(WeightedShuffle(weights, replacement=False), 4, seed=3, epoch=1) == [0, 3, 1, 2]


@pytest.mark.parametrize("field", ["size", "mixed"])
def test_blocks_below_one_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=rf"{field}=\) must be from 1 to \d+, got 0"):
        BlockShuffle(**{"size": 2, "mixed": 2, field: 0})


# --- weights --------------------------------------------------------------------------------------------------------


def test_draws_with_replacement_come_as_often_as_their_weights_say() -> None:
    weights = [0.5, 0.0, 2.0, 1.5, 0.0]
    shuffle = WeightedShuffle(weights, length=20_000)
    counts = Counter(epoch_of(shuffle, 5))
    for example, weight in enumerate(weights):
        share = weight / sum(weights)
        assert abs(counts[example] - 20_000 * share) <= 5 * math.sqrt(20_000 * share * (1 - share))


def test_draws_without_replacement_follow_the_weights_of_those_that_are_left() -> None:
    """All orders of three against the definition: P(i, j, k) = w_i / W * w_j / (W - w_i)."""
    weights = [1.0, 2.0, 4.0, 0.0]
    shuffle = WeightedShuffle(weights, replacement=False)
    num_draws = 4000
    counts = Counter(tuple(epoch_of(shuffle, 4, epoch=epoch)) for epoch in range(num_draws))
    for first, second, third in itertools.permutations(range(3)):
        share = weights[first] / 7 * weights[second] / (7 - weights[first])
        assert abs(counts[first, second, third] - num_draws * share) < 5 * math.sqrt(num_draws * share * (1 - share))
    assert sum(counts.values()) == sum(counts[order] for order in itertools.permutations(range(3)))


@given(
    weights=st.lists(st.sampled_from([0.0, 1e-300, 1.0, 3.5, 1e300]), min_size=1, max_size=30), seed=st.integers(0, 99)
)
def test_without_replacement_each_example_of_some_weight_comes_once(weights: list[float], seed: int) -> None:
    some = [example for example, weight in enumerate(weights) if weight]
    if not some:
        return
    shuffle = WeightedShuffle(torch.tensor(weights, dtype=torch.float64), replacement=False)
    assert sorted(epoch_of(shuffle, len(weights), seed=seed)) == some
    assert set(epoch_of(WeightedShuffle(weights), len(weights), seed=seed)) <= set(some)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"weights": [1.0, -1.0]}, "finite, not negative, and not all 0"),
        ({"weights": [1.0, math.nan]}, "finite, not negative, and not all 0"),
        ({"weights": [0.0, 0.0]}, "finite, not negative, and not all 0"),
        ({"weights": []}, "finite, not negative, and not all 0"),
        (
            {"weights": [1.0, 0.0, 2.0], "replacement": False, "length": 3},
            "from 1 to 2 .the examples of weight above 0, as none comes twice., got 3",
        ),
        ({"weights": [1.0], "length": 0}, "length must be from 1 to .*, got 0"),
    ],
    ids=str,
)
def test_weights_that_cannot_be_drawn_from_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        WeightedShuffle(**arguments)


def test_uniform_numbers_are_uniform() -> None:
    numbers = uniforms(key_of(5, 6), np.arange(100_000))
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert abs(numbers.mean() - 0.5) < 5 / math.sqrt(12 * 100_000)
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 5 / math.sqrt(100_000)
