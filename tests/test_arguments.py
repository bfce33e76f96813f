"""The sentences of the checks that all layers share."""

from __future__ import annotations

import math
from typing import Literal

import pytest

from adabatch.arguments import require, require_one_of, some


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
