"""What a step is given: this rank's micro-batches, and how many examples they hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

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
    """

    batches: Iterable[Any]
    sizes: Sequence[int]
    num_examples: int
    weights: LossWeights | None = None


class Feed(Protocol):
    """Hands out the portions of steps; None when the pass over the data is over, on all ranks at once."""

    def take(self, plan: BatchPlan) -> Portion | None:
        """The portion of the next step."""
        ...

    def consumed(self, portion: Portion) -> None:
        """The step has run: what it took counts as seen."""
        ...


def num_examples_in(batch: Any) -> int:
    """Examples in a micro-batch: the first dimension of the first tensor found in it that has one.

    Raises:
        TypeError: no such tensor is in it.
    """
    found = _first_tensor(batch)
    if found is None:
        raise TypeError(
            f"cannot tell how many examples a micro-batch of type {type(batch).__name__} holds: "
            f"pass count=, a function from micro-batch to number of examples, to AdaptiveBatch.steps"
        )
    return found.shape[0]


def _first_tensor(batch: Any) -> Tensor | None:
    if isinstance(batch, Tensor):
        return batch if batch.dim() else None
    if isinstance(batch, Mapping):
        batch = batch.values()
    if isinstance(batch, Iterable) and not isinstance(batch, str | bytes):
        for item in batch:
            found = _first_tensor(item)
            if found is not None:
                return found
    return None
