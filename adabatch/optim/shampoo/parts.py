"""Parts of parameters: the runs of blocks whose roots one rank computes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

LARGEST_PART = 0.5
"""Largest cost of a part, as a share of a rank's fair share of all costs, if the blocks permit it. Parts that are dealt
in order of falling cost then give no rank more than 1.5 times its share."""


class Part(NamedTuple):
    """A run of blocks of one parameter.

    Args:
        name: its name for the owner.
        blocks: which of the parameter's blocks, in their order.
    """

    name: str
    blocks: slice


def divided(costs: Sequence[float], num_blocks: Sequence[int], *, num_owners: int) -> list[list[Part]]:
    """Divides the blocks of each parameter into parts for up to ``num_owners`` owners.

    A parameter has one part if it is cheap or has one block, and never more parts than owners.

    Args:
        costs: of each parameter; all blocks of a parameter cost the same.
        num_blocks: of each parameter.
        num_owners: number of ranks that can own parts of one parameter.

    Returns:
        The parts of each parameter, of nearly the same number of blocks. A single part has the parameter's number as
        its name.
    """
    largest = LARGEST_PART * sum(costs) / num_owners
    return [
        _parts(str(number), blocks, min(num_owners, blocks, math.ceil(cost / largest)) if cost else 1)
        for number, (cost, blocks) in enumerate(zip(costs, num_blocks, strict=True))
    ]


def _parts(name: str, num_blocks: int, num_parts: int) -> list[Part]:
    if num_parts == 1:
        return [Part(name, slice(0, num_blocks))]
    ends = [index * num_blocks // num_parts for index in range(num_parts + 1)]
    return [Part(f"{name}.{index}", slice(*ends[index : index + 2])) for index in range(num_parts)]
