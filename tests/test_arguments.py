"""The sentences of the checks that all layers share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike

from adabatch.arguments import (
    check_fields,
    checked,
    checked_but,
    number,
    require,
    require_one_of,
    require_state,
    shown,
    some,
    whole,
)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_rule_that_does_not_hold_is_told_with_the_value(value: float) -> None:
    with pytest.raises(ValueError, match=rf"^eta must be positive, got {value}$"):
        require(0 < value < math.inf, "eta must be positive", value)


def test_a_rule_that_holds_is_silent() -> None:
    require(True, "eta must be positive", 1.0)


@pytest.mark.parametrize("choices", [Literal["a", "b"], ("a", "b"), {"a": 1, "b": 2}])
def test_choices_are_a_literal_or_names(choices: object) -> None:
    require_one_of("kind", "b", choices)
    with pytest.raises(ValueError, match=r"^kind must be one of a, b, got 'c'$"):
        require_one_of("kind", "c", choices)


def test_few_names_are_told_whole_and_many_cut() -> None:
    assert some(["a", "b", "c"]) == "a, b, c"
    assert some(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
    assert some(["a", "b"], most=1) == "a and 1 more"


# --- types, as annotations say them -----------------------------------------------------------------------------------


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


@checked
def typed(
    count: int,
    share: float = 0.5,
    *,
    on: bool = False,
    name: str | None = None,
    kind: Literal["a", "b"] = "a",
    sizes: Sequence[int] = (),
    values: ArrayLike = 0.0,
    call: Callable[[], int] | None = None,
    by_name: Mapping[str, float] | None = None,
    pair: tuple[float, float] = (1.0, 1.0),
    anything: Any = None,
) -> tuple[Any, ...]:
    """A function with each form of annotation."""
    return count, share, on, name, kind, sizes, values, call, by_name, pair, anything


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        ({"count": 3.0}, TypeError, r"^count must be a whole number, got 3.0 \(of type float\)$"),
        ({"count": True}, TypeError, r"count must be a whole number, got True \(of type bool\)"),
        ({"count": np.array([3])}, TypeError, "count must be a whole number, got array"),
        ({"count": torch.tensor(True)}, TypeError, "count must be a whole number"),
        ({"count": 10**5000}, ValueError, r"^count must be a whole number, up to 18446744073709551615, got a value of"),
        ({"count": 1, "share": "0.5"}, TypeError, r"share must be a number, got '0.5' \(of type str\)"),
        ({"count": 1, "share": 1j}, TypeError, "share must be a number"),
        ({"count": 1, "on": 1}, TypeError, r"on must be True or False, got 1 \(of type int\)"),
        ({"count": 1, "name": 3}, TypeError, r"name must be text or None, got 3"),
        ({"count": 1, "kind": "c"}, ValueError, r"^kind must be one of a, b, got 'c'$"),
        ({"count": 1, "kind": 3}, TypeError, r"kind must be one of a, b, got 3 \(of type int\)"),
        ({"count": 1, "sizes": "12"}, TypeError, "sizes must be a sequence of whole numbers, got '12'"),
        ({"count": 1, "sizes": [1, 2.5]}, TypeError, r"sizes must be a sequence of whole numbers, got \[1, 2.5\]"),
        ({"count": 1, "sizes": np.array([1.0])}, TypeError, "sizes must be a sequence of whole numbers"),
        (
            {"count": 1, "values": ["a"]},
            TypeError,
            "values must be numbers, as an array or a list of them",
        ),
        ({"count": 1, "values": [[1], [1, 2]]}, TypeError, "values must be numbers"),
        ({"count": 1, "call": 3}, TypeError, "call must be something to call, such as a function or None, got 3"),
        ({"count": 1, "by_name": {"a": "b"}}, TypeError, "by_name must be a mapping of text to numbers or None"),
        ({"count": 1, "pair": (1.0,)}, TypeError, r"pair must be \(a number, a number\), got \(1.0,\)"),
        (
            {"count": Unshowable()},
            TypeError,
            "count must be .*, got a value of type Unshowable",
        ),
    ],
)
def test_what_an_annotation_does_not_allow_is_refused(given: dict[str, Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        typed(**given)


def test_numbers_become_those_of_python_and_all_else_stays_what_it_is() -> None:
    sizes, by_name, thing = [1, 2], {"a": 1.5}, Unshowable()
    found = typed(np.int32(3), torch.tensor(0.5), on=np.bool_(True), sizes=sizes, by_name=by_name, anything=thing)
    assert [type(each) for each in found[:3]] == [int, float, bool]
    assert found[5] is sizes
    assert found[8] is by_name
    assert found[10] is thing
    taken = typed(1, sizes=[np.int64(1), 2], by_name={"a": np.float64(2)}, values=[1, 2])
    assert [type(each) for each in (taken[5][0], taken[8]["a"], taken[6][0])] == [int, float, np.float64]


def test_an_error_of_the_function_itself_is_its_own() -> None:
    with pytest.raises(TypeError, match=r"typed\(\)|missing a required argument: 'count'"):
        typed()  # type: ignore[call-arg]


def test_some_arguments_are_left_to_the_function() -> None:
    @checked_but("left")
    def half(left: int, right: int) -> tuple[Any, Any]:
        return left, right

    assert half("x", 1) == ("x", 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="right must be"):
        half("x", "y")  # type: ignore[arg-type]


def test_fields_of_a_frozen_dataclass_are_converted() -> None:
    @dataclass(frozen=True)
    class Pair:
        first: int
        second: float = 0.5

        def __post_init__(self) -> None:
            check_fields(self, "pair.")

    assert type(Pair(np.int64(1)).first) is int
    with pytest.raises(TypeError, match=r"^pair.second must be a number, got 'x'"):
        Pair(1, "x")  # type: ignore[arg-type]


def test_bounds_of_numbers_are_told() -> None:
    assert whole("count", torch.tensor(3), at_most=3) == 3
    with pytest.raises(ValueError, match=r"^count must be from 1 to 3 \(rows\), got 4$"):
        whole("count", 4, at_least=1, at_most=3, why="rows")
    assert number("share", np.float64(0.5)) == 0.5
    for wrong in (math.nan, 0, 2, math.inf):
        with pytest.raises(ValueError, match=rf"^share must be above 0 and at most 1, got {wrong}$"):
            number("share", wrong, above=0, at_most=1)
    with pytest.raises(ValueError, match="share must be finite, got inf"):
        number("share", math.inf)
    assert number("share", math.inf, at_most=math.inf) == math.inf


def test_a_saved_state_must_have_its_entries() -> None:
    require_state({"format": 1, "more": 2}, "format", of="a run")
    with pytest.raises(TypeError, match=r"^state must be what state_dict\(\) of a run returned, got 3"):
        require_state(3, "format", of="a run")
    with pytest.raises(ValueError, match=r"returned, with format, steps, got \['format'\]$"):
        require_state({"format": 1}, "format", "steps", of="a run")


def test_values_are_shown_in_one_line_and_not_too_long() -> None:
    assert shown("x") == "'x'"
    assert shown(np.zeros((2, 2))).count("\n") == 0
    assert len(shown([1] * 1000)) < 200
    assert shown(Unshowable()) == "a value of type Unshowable"
