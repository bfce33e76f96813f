"""Random numbers that go on where they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from adabatch.runtime.random_state import random_state, restore_random_state

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_numbers() -> Iterator[None]:
    """Leaves the generators of the process as they were."""
    python, legacy, state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    yield
    random.setstate(python)
    np.random.set_state(legacy)  # noqa: NPY002
    torch.set_rng_state(state)


def drawn() -> list[float]:
    """Of each generator, with the second halves of pairs that they hold back."""
    return [random.random(), random.gauss(0, 1), np.random.randn(), np.random.rand(), float(torch.randn(()))]  # noqa: NPY002


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002
    torch.manual_seed(number)


@pytest.mark.parametrize("draws", [0, 1, 2])
def test_what_is_drawn_after_a_restore_is_what_was_drawn_after_the_save(draws: int) -> None:
    seed(3)
    for _ in range(draws):  # an odd number leaves half a pair of normal numbers
        drawn()
    rows = torch.stack([random_state(CPU), random_state(CPU)])
    expected = [drawn() for _ in range(5)]
    seed(4)
    assert restore_random_state(rows, 1, CPU)
    assert [drawn() for _ in range(5)] == expected


def test_a_rank_that_was_not_saved_begins_with_numbers_of_its_own_the_same_each_time() -> None:
    seed(3)
    rows = torch.stack([random_state(CPU), random_state(CPU)])
    found: dict[int, Any] = {}
    for rank in (0, 2, 3, 2):
        own = restore_random_state(rows, rank, CPU)
        assert own == (rank < 2)
        assert found.setdefault(rank, drawn()) is not None
    again = restore_random_state(rows, 2, CPU)
    assert not again
    assert drawn() == found[2]
    for index in range(5):
        assert len({numbers[index] for numbers in found.values()}) == 3
