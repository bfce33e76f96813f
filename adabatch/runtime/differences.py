"""What differs between ranks that should hold the same, as an error says it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

_NAMED = 4
"""Differences that an error names."""


def rank_differences(ranks: Sequence[Mapping[str, str]], who: str = "rank") -> str:
    """What differs between ranks, with the values and who holds them; empty if nothing does.

    Args:
        ranks: of each rank, texts by name.
        who: what to call a rank.
    """
    # the union, in the order of their first mention: a rank may lack a setting altogether
    names = list(dict.fromkeys(name for held in ranks for name in held))
    differing = [name for name in names if len({held.get(name) for held in ranks}) > 1]
    told = "; ".join(
        _difference(name, [held.get(name, "nothing") for held in ranks], who) for name in differing[:_NAMED]
    )
    return told + (f"; and {len(differing) - _NAMED} more" if len(differing) > _NAMED else "")


def _difference(name: str, held: Sequence[str], who: str) -> str:
    by_value: dict[str, list[int]] = defaultdict(list)
    for rank, text in enumerate(held):
        by_value[text].append(rank)
    values = [
        f"{text} on {who}{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}" for text, ranks in by_value.items()
    ]
    return f"{name} is {' and '.join(values)}"
