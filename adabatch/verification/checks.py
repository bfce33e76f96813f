"""All checks, one after the other."""

from __future__ import annotations

from collections.abc import Iterator

from adabatch.arguments import require
from adabatch.verification.constant import constant_policy
from adabatch.verification.drifting import drift
from adabatch.verification.probing import probe_agrees
from adabatch.verification.resuming import resume
from adabatch.verification.timing import cost
from adabatch.verification.training import Check, Make


def all_checks(make: Make, *, num_steps: int = 20, max_cost: float | None = None) -> Iterator[Check]:
    """The checks of this package one after the other, the cheapest first.

    Args:
        make: builds a new training.
        num_steps: steps beside the hand-written loop, and pairs of steps whose time is compared.
        max_cost: largest time of a probed step over one without a probe; None only reports it.

    Raises:
        ValueError: if something cannot be checked, see each check; or if there are fewer than 4 steps.
    """
    require(num_steps >= 4, "the checks need at least 4 steps", num_steps)
    require(max_cost is None or max_cost > 0, "max_cost must be positive (1.05 allows 5 % more time)", max_cost)
    yield drift(make)
    yield probe_agrees(make)
    yield constant_policy(make, num_steps=num_steps)
    yield resume(make)
    yield cost(make, num_pairs=num_steps, max_cost=max_cost)
