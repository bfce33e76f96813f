"""States as plain data, which a checkpoint can read back without running code; other data is an error that names it."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PLAIN = (type(None), bool, int, float, complex, str, bytes)


class NotPlain(TypeError):
    """A state contains something that a checkpoint could not read back."""


def plain(state: Any, path: str = "", *, copy: bool = False) -> Any:
    """A state in containers and values that ``torch.load(weights_only=True)`` reads.

    Numbers of numpy become those of Python if that is exact: all except ``np.longdouble`` and dates.
    Mappings, lists and tuples are rebuilt as plain ones; of what subclasses add, only the ``_metadata`` of a state dict
    is kept. Other objects are kept if torch can read them, which is tested.

    Args:
        state: a state dict, or part of one.
        path: its place, for messages: "optimizer".
        copy: whether to replace tensors by copies on the CPU, so that training may change the originals. DTensors
            become DTensors of the same shards.

    Raises:
        NotPlain: names the place of what cannot be read back: "optimizer.param_groups[0]['lr']".
    """
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True) if copy else state
    # the exact type: an np.float64 is a float too, and is pickled as numpy's class
    if type(state) in _PLAIN:
        return state
    if isinstance(state, np.generic):
        return _number(state, path)
    if isinstance(state, Mapping):
        items = [(_key(key, path), plain(value, _below(path, key), copy=copy)) for key, value in state.items()]
        if not isinstance(state, OrderedDict):
            return dict(items)
        rebuilt: OrderedDict[Any, Any] = OrderedDict(items)
        if hasattr(state, "_metadata"):  # torch's modules keep the versions of their parts there
            rebuilt._metadata = plain(state._metadata, f"{path}._metadata")  # type: ignore[attr-defined]
        return rebuilt
    # torch.Size is a tuple that torch reads back as what it is
    if type(state) is list or (isinstance(state, tuple) and not isinstance(state, torch.Size)):
        values = [plain(value, f"{path}[{index}]", copy=copy) for index, value in enumerate(state)]
        return values if isinstance(state, list) else tuple(values)
    return _tried(state, path)


def _number(value: np.generic[Any], path: str) -> Any:
    item = value.item()
    # np.longdouble gives itself back, and datetime64 may give a plain integer without its unit.
    if type(item) not in _PLAIN or isinstance(value, np.datetime64 | np.timedelta64):
        raise _refusal(value, path)
    return item


def _key(key: Any, path: str) -> Any:
    return plain(key, f"the key {key!r} of {path}")


def _below(path: str, key: Any) -> str:
    """The place of an entry: an attribute of a part, an item of what is inside."""
    if "." not in path and isinstance(key, str) and key.isidentifier():
        return f"{path}.{key}" if path else key
    return f"{path}[{key!r}]"


def _tried(value: Any, path: str) -> Any:
    """A value of another type, if torch can read it back."""
    file = io.BytesIO()
    try:
        # tried rather than looked up: torch's list of safe types is private, grows, and users add to it
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except (pickle.PicklingError, pickle.UnpicklingError, AttributeError, TypeError, RuntimeError) as error:
        raise _refusal(value, path) from error
    return value


def _refusal(value: Any, path: str) -> NotPlain:
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    way_out = "torch.from_numpy" if isinstance(value, np.ndarray) else "a number, a text, a tensor, or a list or dict"
    shown = repr(value)
    return NotPlain(
        f"{path} is {shown if len(shown) < 60 else shown[:57] + '...'}, a {name}, which a checkpoint could not read "
        f"back without running code: use {way_out} of it"
    )
