"""A shape of a user's own: what is asked of it, what is saved of it, and what a saved one is compared by."""

from __future__ import annotations

import itertools
import json
import math
import random
from functools import partial
from typing import Any

import numpy as np
import pytest

from adabatch import lr
from adabatch.lr.function_shape import FunctionShape, check_same_shape, shape_from


def half_cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


def line(progress: float, *, end: float = 0.0) -> float:
    return 1 - (1 - end) * progress


class Cliff:
    """A callable object."""

    def __init__(self, at: float) -> None:
        self.at = at

    def __call__(self, progress: float) -> float:
        return 1.0 if progress < self.at else 0.1


def test_numbers_give_numbers_and_arrays_arrays_clamped() -> None:
    shape = FunctionShape(half_cosine)
    assert shape(0.3) == half_cosine(0.3)
    assert (shape(-1.0), shape(7.0)) == (1.0, half_cosine(1.0))
    together = shape(np.array([[0.0, 0.3], [1.0, 2.0]]))
    assert together.tolist() == [[1.0, half_cosine(0.3)], [half_cosine(1.0)] * 2]
    assert shape([0.3]).tolist() == [shape(0.3)]
    with pytest.raises(ValueError, match="NaN"):
        shape(math.nan)


def test_it_serves_where_a_shape_does() -> None:
    own, ours = FunctionShape(line), lr.linear()
    np.testing.assert_allclose(lr.discretize(own, 50, warmup_steps=5), lr.discretize(ours, 50, warmup_steps=5))
    assert lr.transfer(0.1, own, ours, num_steps=100) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("function", "name"),
    [(line, "line"), (lambda p: 1.0, "<lambda>"), (Cliff(0.5), "Cliff"), (partial(line, end=0.5), "partial")],
)
def test_whatever_can_be_called_has_a_name(function: Any, name: str) -> None:
    assert FunctionShape(function).name.endswith(name)
    assert FunctionShape(function, name="mine").name == "mine"


@pytest.mark.parametrize(
    ("function", "error", "words"),
    [
        (lambda p: math.nan, ValueError, r"must be finite and not negative, got nan at progress 0\.0"),
        (lambda p: 0.5 - p, ValueError, r"must be finite and not negative, got -0\.0\d+ at progress 0\.50390625"),
        (lambda p: math.inf, ValueError, "got inf"),
        (lambda p: 0.0, ValueError, "all of its values are zero"),
        (lambda p: "high", TypeError, "must return a number, got 'high' at progress 0"),
        (lambda p: None, TypeError, "must return a number, got None"),
        (lambda p: random.random(), ValueError, "gave two values at progress 0.0: a shape must be a function of"),
        (3, TypeError, "a shape must be a function of progress, got 3"),
        (lambda: 1.0, TypeError, "positional argument"),
    ],
)
def test_what_is_no_shape_is_named_when_it_is_made(function: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        FunctionShape(function)


def test_a_value_that_only_comes_out_wrong_later_is_named_too() -> None:
    shape = FunctionShape(lambda p: -1.0 if 0.302 < p < 0.304 else 1.0)
    with pytest.raises(ValueError, match=r"must be finite and not negative, got -1\.0 at progress 0\.303"):
        shape(0.303)


def test_a_function_with_a_memory_is_found() -> None:
    calls = itertools.count()
    with pytest.raises(ValueError, match="without memory or chance"):
        FunctionShape(lambda p: 1.0 + next(calls))


def test_what_is_saved_is_compared_by_its_values() -> None:
    saved = json.loads(json.dumps(FunctionShape(line).to_dict()))
    check_same_shape(FunctionShape(lambda p: 1 - p), saved)
    check_same_shape(FunctionShape(lambda p: (1 - p) * (1 + 1e-12)), saved)
    with pytest.raises(ValueError, match=r"the function line, which is 0\.9\d+ at progress 0\.003906, this run has"):
        check_same_shape(FunctionShape(half_cosine), saved)
    with pytest.raises(ValueError, match=r"the function line, this run has linear\(\): use one of them"):
        check_same_shape(lr.linear(), saved)
    with pytest.raises(ValueError, match=r"the shape cosine\(\), this run has FunctionShape\(line\)"):
        check_same_shape(FunctionShape(line), lr.cosine().to_dict())


def test_what_a_user_gives() -> None:
    assert shape_from(lr.linear()) == lr.linear()
    own = FunctionShape(line)
    assert shape_from(own) is own
    assert isinstance(shape_from(line), FunctionShape)
    for wrong in ("cosine", None, 0.5, lr.cosine, lr.Shape):
        with pytest.raises(TypeError, match=r"must come from adabatch.lr, such as adabatch.lr.cosine\(\), or be a"):
            shape_from(wrong)  # type: ignore[arg-type]
