"""Reductions of a single process, which are none."""

from __future__ import annotations

import torch
from support.loops import network

from adabatch.runtime.collectives import Collectives, collectives_of


def test_a_single_process_reduces_nothing() -> None:
    alone = Collectives()
    values = torch.tensor([1.0, 2.0])
    assert (alone.rank, alone.size) == (0, 1)
    assert alone.sum(values) is values
    assert alone.sum_of(1, 2.5) == [1.0, 2.5]
    assert alone.minimum_of(3, -4) == [3.0, -4.0]
    assert alone.agree({"anything": 1})


def test_a_plain_model_in_a_single_process_has_its_ranks() -> None:
    assert collectives_of(network()).size == 1
