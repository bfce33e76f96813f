"""What a step is given: this rank's micro-batches, and how many examples they hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from adabatch.batch.plan import BatchPlan


class LossWeights(NamedTuple):
    """How much micro-batches count for in the step's gradient, in one unit.

    Args:
        of_each: micro-batch of this rank.
        total: of all ranks and micro-batches.
    """

    of_each: Sequence[float]
    total: float


@dataclass(frozen=True)
class Portion:
    """What one step takes on this rank.

    Args:
        batches: the micro-batches, to be iterated once.
        sizes: examples in each, known before the first is run.
        num_examples: examples of the whole step, over all ranks.
        weights: of the micro-batches in the step's gradient, where those are not their examples.
        plan: what the step is made of, where it is not what was planned.
    """

    batches: Iterable[Any]
    sizes: Sequence[int]
    num_examples: int
    weights: LossWeights | None = None
    plan: BatchPlan | None = None


class Feed(Protocol):
    """Hands out the portions of steps; None when the pass over the data is over, on all ranks at once."""

    def take(self, plan: BatchPlan) -> Portion | None:
        """The portion of the next step."""
        ...

    def consumed(self, portion: Portion) -> None:
        """The step has run: what it took counts as seen."""
        ...
