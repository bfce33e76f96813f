"""Finding numbers that are not finite in a gradient, however it is stored."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from adabatch.guards.finite import nonfinite_in


def found(*grads: Tensor | None, loss: float = 1.0) -> float:
    parameters = [nn.Parameter(torch.zeros_like(g.to_dense()) if g is not None else torch.zeros(2)) for g in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    number = nonfinite_in(SGD(parameters, lr=0.1))(torch.tensor(loss, dtype=torch.float64))
    assert (number.shape, number.dtype) == ((1,), torch.float64)
    return float(number)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_number_among_many_is_found(dtype: torch.dtype, bad: float) -> None:
    grad = torch.ones(100_003, dtype=dtype)
    assert found(torch.ones(3, dtype=dtype), grad) == 0
    grad[77_777] = bad
    assert found(torch.ones(3, dtype=dtype), grad) == 1


def test_the_loss_counts_too() -> None:
    assert [found(torch.ones(2), loss=loss) for loss in (1.0, math.nan, math.inf)] == [0, 1, 1]


def test_the_largest_finite_numbers_are_finite() -> None:
    for dtype in (torch.float32, torch.float16):
        assert found(torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)) == 0


def test_gradients_may_be_missing_empty_or_sparse() -> None:
    assert found(None, torch.zeros(0)) == 0
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 2]]), torch.tensor([1.0, math.nan]), (4,), check_invariants=True)
    assert found(sparse, None) == 1
