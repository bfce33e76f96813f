"""Checks of the parameters that an optimizer is given, before torch's own, which do not name the argument."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from adabatch.arguments import require, require_type


def listed(params: Iterable[Any]) -> list[Any]:
    """The parameters as a list: tensors, (name, tensor) pairs, or groups as mappings with "params".

    Raises:
        TypeError: if it is not such a collection.
        ValueError: if it is empty.
    """
    rule = "params must be the parameters of a model, or a list of groups with 'params'"
    require_type(isinstance(params, Iterable) and not isinstance(params, Tensor | str | bytes | Mapping), rule, params)
    members = list(params)
    require(len(members) > 0, f"{rule}: at least one", members)
    require_type(all(_is_member(one) for one in members), rule, members)
    return members


def _is_member(one: Any) -> bool:
    if isinstance(one, Mapping):
        inside = one.get("params")
        if isinstance(inside, Tensor):
            return True
        # An iterator would be used up here; torch takes it as it is.
        return isinstance(inside, Iterable) and (not isinstance(inside, list | tuple) or all(map(_is_tensor, inside)))
    return _is_tensor(one)


def _is_tensor(one: Any) -> bool:
    return isinstance(one, Tensor) or (isinstance(one, tuple) and len(one) == 2 and isinstance(one[1], Tensor))
