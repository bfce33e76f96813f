"""Checks of the user's arguments, and their messages; every layer may use them.

Only sentences of the form "... must be ..., got ..." are built here. A message that needs more, such as a way out at
its end or an error other than ``ValueError``, stands where it is raised.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, get_args


def require(holds: bool, rule: str, value: object) -> None:
    """Raises an error that tells the rule and the value, unless the rule holds.

    Args:
        holds: the condition. Write it such that NaN breaks it: ``0 < x``, not ``not x <= 0``.
        rule: names the argument and what is allowed, such as "eta must be positive".
        value: what was given.

    Raises:
        ValueError: if ``holds`` is false.
    """
    if not holds:
        raise ValueError(f"{rule}, got {value}")


def require_one_of(name: str, value: object, choices: Any) -> None:
    """Raises an error that lists the choices, unless the value is one of them.

    Args:
        name: of the argument.
        value: what was given.
        choices: a ``Literal`` type, or the names themselves.

    Raises:
        ValueError: if ``value`` is not among the choices.
    """
    names: Iterable[Any] = get_args(choices) or choices
    if value not in names:
        raise ValueError(f"{name} must be one of {', '.join(names)}, got {value!r}")


def some(names: Sequence[str], most: int = 3) -> str:
    """The first ``most`` of the names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
