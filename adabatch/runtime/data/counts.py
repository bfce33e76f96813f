"""Checks of whole numbers from the user."""

from __future__ import annotations

import operator
from typing import Any

from adabatch.arguments import require


def checked_count(name: str, value: Any, *, least: int, most: int, why: str = "") -> int:
    """The number as an ``int``; numbers of numpy and torch are whole numbers too.

    Args:
        name: of the argument, for errors.
        value: the user's value.
        least: the smallest value that is allowed.
        most: the largest.
        why: the reason for the largest value.

    Raises:
        TypeError: if it is not a whole number.
        ValueError: if it is out of bounds.
    """
    if isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {value}")
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from None
    require(least <= count <= most, f"{name} must be from {least} to {most}{why and f' ({why})'}", count)
    return count
