"""Objects that a user of ``adabatch mup`` names by an import path, and methods by their name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from adabatch.optim.mup.methods import METHODS, TrainingMethod


def method_of(name: str, methods: Mapping[str, TrainingMethod] = METHODS) -> TrainingMethod:
    """A method by its name, or a user's function by its import path.

    Args:
        name: see there.
        methods: those with a name.

    Raises:
        ValueError: if it is neither.
    """
    if "." in name:
        found: TrainingMethod = imported(name)
        return found
    if name not in methods:
        raise ValueError(
            f"method must be one of {', '.join(methods)}, or the import path of a function of (model, plan, lr, "
            f"damping) that returns an optimizer; got {name!r}"
        )
    return methods[name]


def imported(path: str) -> Any:
    """The object of an import path, such as ``package.module.function``.

    Raises:
        ValueError: if it cannot be imported or called.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{path!r} cannot be imported ({error}): give package.module.function") from error
    if not callable(found):
        raise ValueError(f"{path} is not a function or class, but {type(found).__name__}")
    return found
