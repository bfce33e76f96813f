"""Stacks of blocks: the unit that one rank computes the roots of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

LARGEST_STACK = 0.5
"""Largest cost of a stack in units of a rank's fair share of all costs, where blocks are small enough. Such stacks,
assigned in order of falling cost, give no rank more than one and a half times its share."""


class Stack(NamedTuple):
    """Consecutive blocks of one parameter.

    Args:
        name: its name for the owner.
        blocks: which of the parameter's blocks.
    """

    name: str
    blocks: slice


def divided(costs: Sequence[float], num_blocks: Sequence[int], *, num_owners: int) -> list[list[Stack]]:
    """Divides the blocks of each parameter into stacks.

    A parameter has one stack if it is cheap or has one block, and never more stacks than owners.

    Args:
        costs: of each parameter; all blocks of a parameter cost the same.
        num_blocks: of each parameter.
        num_owners: number of ranks that can own stacks of one parameter.

    Returns:
        The stacks of each parameter, of nearly the same number of blocks. A single stack has the parameter's number as
        its name.
    """
    largest = LARGEST_STACK * sum(costs) / num_owners
    return [
        _stacks(str(number), blocks, min(num_owners, blocks, math.ceil(cost / largest)) if cost else 1)
        for number, (cost, blocks) in enumerate(zip(costs, num_blocks, strict=True))
    ]


def _stacks(name: str, num_blocks: int, num_stacks: int) -> list[Stack]:
    if num_stacks == 1:
        return [Stack(name, slice(0, num_blocks))]
    ends = [index * num_blocks // num_stacks for index in range(num_stacks + 1)]
    return [Stack(f"{name}.{index}", slice(*ends[index : index + 2])) for index in range(num_stacks)]
