"""The data of a step: this rank's micro-batches, and how many examples they hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from adabatch.batch.plan import BatchPlan


class LossWeights(NamedTuple):
    """Weights of micro-batches in the step's gradient, all in one unit.

    Args:
        of_each: the weight of each micro-batch of this rank.
        total: sum of the weights of all micro-batches of all ranks.
    """

    of_each: Sequence[float]
    total: float


@dataclass(frozen=True)
class Portion:
    """The data of one step on this rank.

    Args:
        batches: the micro-batches, to be iterated once.
        sizes: examples in each, known before the first is run.
        num_examples: examples of the whole step, over all ranks.
        weights: of the micro-batches in the step's gradient; None if they are weighted by their examples.
        plan: the actual composition of the step, if it differs from the planned one.
    """

    batches: Iterable[Any]
    sizes: Sequence[int]
    num_examples: int
    weights: LossWeights | None = None
    plan: BatchPlan | None = None


class Feed(Protocol):
    """Gives the portions of steps; None at the end of a pass over the data, on all ranks at once."""

    def take(self, plan: BatchPlan) -> Portion | None:
        """The portion of the next step."""
        ...

    def consumed(self, portion: Portion) -> None:
        """The step has run: its examples count as seen."""
        ...
