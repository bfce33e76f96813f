"""A hash of weights: one bit anywhere changes it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adabatch.runtime.engines.copies import fingerprint

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.complex64]
SIZE = 300_000  # more than one block


@given(dtype=st.sampled_from(DTYPES), place=st.integers(0, SIZE - 1), seed=st.integers(0, 9))
def test_any_element_changes_it(dtype: torch.dtype, place: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-9, 9, (SIZE,), generator=generator).to(dtype)
    other = values.clone()
    assert fingerprint([values]) == fingerprint([other])
    other[place] += 1
    assert fingerprint([values]) != fingerprint([other])


@pytest.mark.parametrize("bit", range(32))
def test_any_bit_changes_it(bit: int) -> None:
    values = torch.randn(100)
    other = values.clone()
    other.view(torch.int32)[41] ^= -(2**31) if bit == 31 else 1 << bit
    assert fingerprint([values]) != fingerprint([other])


def test_the_order_counts() -> None:
    values = torch.randn(SIZE)
    swapped = values.clone()
    swapped[[3, 299_999]] = swapped[[299_999, 3]]
    assert fingerprint([values]) != fingerprint([swapped])
    first, second = values[:7].clone(), values[7:14].clone()
    assert fingerprint([first, second]) != fingerprint([second, first])


def test_what_a_tensor_looks_like_in_memory_does_not_count() -> None:
    values = torch.randn(6, 5)
    assert fingerprint([values.t().contiguous().t()]) == fingerprint([values])
    assert fingerprint([torch.tensor(0.0)]) != fingerprint([torch.tensor(-0.0)])
    assert fingerprint([torch.tensor(math.nan)]) == fingerprint([torch.tensor(math.nan)])
    assert fingerprint([torch.zeros(0), torch.tensor(1.0)]) == fingerprint([torch.zeros(0), torch.tensor(1.0)])
    assert fingerprint([]) == fingerprint([])
