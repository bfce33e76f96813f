"""How many examples a micro-batch holds, if its structure leaves no doubt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

WAY_OUT = "pass count=, a function from micro-batch to number of examples, to AdaptiveBatch.steps"


def num_examples_in(batch: Any) -> int:
    """Examples in a micro-batch: the number on which all its entries agree.

    A tensor or array holds one example per row of its first dimension; one without dimensions is ignored. A
    ``PackedSequence`` holds one per sequence. The values of a mapping, and the entries of the micro-batch itself, are
    columns, which must have equal numbers of examples. A list inside them is either columns again or one entry per
    example, whichever agrees with the others.

    Raises:
        TypeError: if no entry has a number of examples.
        ValueError: if its entries disagree, or can be read in two ways.
    """
    try:
        found = _readings(batch, nested=False)
    except RecursionError:
        raise TypeError(f"a micro-batch holds itself, so that its examples cannot be counted: {WAY_OUT}") from None
    if found is None:
        raise TypeError(f"cannot tell how many examples a micro-batch of type {type(batch).__name__} holds: {WAY_OUT}")
    if len(found) != 1:
        why = f"may be {' or '.join(map(str, sorted(found)))}" if found else "differ from entry to entry"
        raise ValueError(f"the examples of a micro-batch {why} ({outline(batch)}): {WAY_OUT}")
    return next(iter(found))


def _readings(entry: Any, *, nested: bool) -> frozenset[int] | None:
    """The possible numbers of examples in an entry; None if it has none, empty if it contradicts itself."""
    if isinstance(entry, PackedSequence):
        return _one(int(entry.batch_sizes[0]))  # all sequences have a first entry
    if isinstance(entry, Tensor | np.ndarray):
        # Not `shape[0]`: a nested tensor has a size but no shape.
        return _one(entry.size(0) if isinstance(entry, Tensor) else len(entry)) if entry.ndim else None
    if isinstance(entry, Mapping):
        return _agreed(entry.values())
    if not isinstance(entry, Sequence) or isinstance(entry, str | bytes):
        return None
    columns = _agreed(entry)
    if not nested or hasattr(entry, "_fields"):  # a named tuple has columns, never examples
        return columns
    # Both readings, of which the other columns of the micro-batch leave one.
    return (columns or frozenset()) | _one(len(entry))


def _one(count: int) -> frozenset[int]:
    return frozenset({count})


def _agreed(columns: Any) -> frozenset[int] | None:
    found = [numbers for numbers in (_readings(column, nested=True) for column in columns) if numbers is not None]
    return frozenset.intersection(*found) if found else None


def outline(entry: Any, *, depth: int = 2) -> str:
    """A micro-batch in a few words, for errors."""
    kind = type(entry).__name__
    if isinstance(entry, Tensor) and entry.is_nested:
        return f"nested {kind} of {entry.size(0)}"
    if isinstance(entry, Tensor | np.ndarray):
        return f"{kind} of shape {tuple(entry.shape)}"
    if isinstance(entry, Mapping):
        inner = [f"{key!r}: {outline(value, depth=depth - 1)}" for key, value in list(entry.items())[:3]]
    elif isinstance(entry, Sequence) and not isinstance(entry, str | bytes):
        inner = [outline(value, depth=depth - 1) for value in entry[:3]]
    else:
        return kind
    more = ", ..." if len(entry) > 3 else ""
    return f"{kind} of {len(entry)}" + (f": {', '.join(inner)}{more}" if depth and inner else "")
