"""Nested values, such as the state of an optimizer or the settings of a run: what is in them, and their text."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from enum import Enum
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adabatch.arguments import shown

_DEEPEST = 6
"""Levels of nested objects that a text shows."""

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """What is in nested mappings, lists and tuples, each with the keys and indices on the way to it."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))
    else:
        yield path, value


def text_of(value: object, depth: int = 0) -> str:
    """A text for a value that is the same in every process with that value; memory addresses are left out.

    Tensors and arrays of more than a few numbers are compared by shape, functions by name and by what they close over.
    """
    if isinstance(value, Tensor | np.ndarray):
        # a whole tensor, such as a state on a device, would be copied to the host to be compared
        if np.prod(value.shape) > 16:
            return f"{type(value).__name__} of shape {tuple(value.shape)}"
        return repr(value.tolist())  # host sync, before the first step
    if isinstance(value, np.generic):
        return repr(value.item())
    if isinstance(value, float | int | str | bytes | None) and not isinstance(value, Enum):
        return repr(value)
    if isinstance(value, Enum | torch.dtype | torch.device):
        return str(value)
    if depth == _DEEPEST:
        return type(value).__qualname__
    # By name, because repr() of a function contains its address, which differs between processes.
    if isinstance(value, FunctionType | type):
        cells = getattr(value, "__closure__", None) or ()
        held = "".join(f" with {text_of(cell.cell_contents, depth + 1)}" for cell in cells)
        return f"{value.__module__}.{value.__qualname__}{held}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{text_of(k)}: {text_of(v, depth + 1)}" for k, v in value.items()) + "}"
    if isinstance(value, Set):
        # sorted, because the order of a set of strings differs between processes
        return "{" + ", ".join(sorted(text_of(each, depth + 1) for each in value)) + "}"
    if isinstance(value, Sequence) and type(value).__repr__ in (list.__repr__, tuple.__repr__):
        return "[" + ", ".join(text_of(each, depth + 1) for each in value) + "]"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif type(value).__repr__ is object.__repr__:
        parts = getattr(value, "__dict__", {})
    else:
        return _ADDRESS.sub("", shown(value, most=10**6))
    inside = ", ".join(f"{name}={text_of(each, depth + 1)}" for name, each in parts.items())
    return f"{type(value).__qualname__}({inside})"
