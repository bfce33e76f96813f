"""The numbers in the groups of an optimizer that decide about its updates, as far as they are on the host."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from adabatch.runtime.optimizers.joined import each_of
from adabatch.runtime.optimizers.step_hooks import host_value


def numbers_in(value: Any) -> Iterator[float]:
    """Numbers on the host; other values, such as a rate on an accelerator, are not read."""
    kind = type(value)
    if kind is float or kind is int or kind is bool:
        yield float(value)
    elif kind is tuple or kind is list:
        for each in value:
            yield from numbers_in(each)
    elif isinstance(value, Tensor) and value.numel() == 1:
        yield host_value(value)


def numbers_of_groups(groups: list[dict[str, Any]]) -> dict[tuple[int, str], list[float]]:
    """The numbers of all settings, by the index of the group and the setting's name."""
    found = {}
    for index, group in enumerate(groups):
        for name, value in group.items():
            numbers = [] if name == "params" else list(numbers_in(value))
            if numbers:
                found[index, name] = numbers
    return found


def digest_of_numbers(numbers: Iterable[float], before: int = 0) -> int:
    """A digest of 32 bits.

    Args:
        numbers: those.
        before: the digest of earlier numbers, which is continued.
    """
    return zlib.crc32(array("d", numbers).tobytes(), before)


def number_settings(optimizer: Optimizer) -> Mapping[str, str]:
    """The settings of an optimizer, or of several, that are numbers; as texts by name, for errors."""
    found = {}
    for number, one in enumerate(each_of(optimizer)):
        for (index, key), numbers in numbers_of_groups(one.param_groups).items():
            found[setting_name(number, index, key)] = numbers_text(numbers)
    return found


def setting_name(optimizer: int, group: int, key: str) -> str:
    """What an error calls a setting of a group of one of several optimizers."""
    which = "optimizer" if optimizer == 0 else f"optimizer {optimizer + 1}"
    return f"{key} of {which} group {group}"


def numbers_text(numbers: list[float]) -> str:
    """The numbers of a setting, as an error shows them."""
    return repr(numbers[0] if len(numbers) == 1 else numbers)
