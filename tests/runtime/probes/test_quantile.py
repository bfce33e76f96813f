"""The quantile without sorting against the one with."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.ranks import run_ranks

from adabatch.runtime.collectives import Collectives
from adabatch.runtime.probes.quantile import LEFT_OUT, quantile_of

numbers = st.one_of(
    st.floats(0, math.inf, width=32), st.sampled_from([0.0, 1.0, 1.0 + 2**-23, 2**-149, math.inf, LEFT_OUT])
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@given(st.lists(st.lists(numbers, max_size=12), min_size=1, max_size=4), st.floats(0, 1, exclude_min=True))
def test_the_quantile_is_the_one_that_sorting_finds(
    dtype: torch.dtype, pieces: list[list[float]], quantile: float
) -> None:
    tensors = [torch.tensor(piece, dtype=dtype) for piece in pieces]
    found = quantile_of(lambda: tensors, quantile, collectives=Collectives())
    counted = sorted(value for piece in pieces for value in piece if value >= 0)
    if not counted:
        assert found == 0
        return
    # Between two ranks rounding decides; a share that is one, up to rounding, is not the next one.
    exact = quantile * len(counted)
    ranks = {max(1, math.ceil(exact)), max(1, math.ceil(exact * (1 - 1e-11)))}
    assert float(found) in {float(torch.tensor(counted[rank - 1], dtype=dtype)) for rank in ranks}


@pytest.mark.parametrize("quantile", [0.1, 0.3, 0.7, 0.9, 1.0])
def test_tenths_are_tenths(quantile: float) -> None:
    """0.7 x 10 is a little above 7 in floating point, and the seventh number is meant."""
    found = quantile_of(lambda: [torch.arange(1.0, 11.0)], quantile, collectives=Collectives())
    assert float(found) == round(quantile * 10)


def on_ranks(rank: int) -> list[float]:
    rng = np.random.default_rng(rank)
    mine = torch.tensor(rng.lognormal(0, 20, size=[1000, 0, 3000][rank]))  # the second has none
    ranks = Collectives(torch.distributed.group.WORLD)
    return [float(quantile_of(lambda: [mine], q, collectives=ranks)) for q in (0.001, 0.5, 0.99, 1.0)]


@pytest.mark.distributed
def test_the_numbers_may_lie_on_several_ranks(tmp_path: Path) -> None:
    rngs = [np.random.default_rng(rank) for rank in range(3)]
    whole = np.concatenate([rng.lognormal(0, 20, size=size) for rng, size in zip(rngs, [1000, 0, 3000], strict=True)])
    expected = [float(np.quantile(whole, q, method="inverted_cdf")) for q in (0.001, 0.5, 0.99, 1.0)]
    assert run_ranks(on_ranks, 3, tmp_path) == [expected] * 3
