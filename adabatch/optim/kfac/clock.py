"""When K-FAC observes and when it computes inverses, and the counts that decide it."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
from torch import Tensor

GROWTH = 1.25
"""Ratio of one interval between two computations of the inverses to the interval before it. A run so computes them
whenever it has become about a quarter longer, until the intervals reach ``refresh``."""

BATCH_CHANGE = 0.1
"""Relative change of the batch beyond which the inverses are computed again."""


@dataclass
class StepCounts:
    """Counts of the whole optimizer, the same on all ranks.

    Args:
        steps: steps so far.
        observations: calls of ``observe`` that measured.
        refreshes: how often the inverses were computed.
        since_refresh: examples since the inverses were computed; steps without an observation count as the last one
            with an observation does.
        last_batch: examples in the last step that observed.
    """

    steps: float = 0.0
    observations: float = 0.0
    refreshes: float = 0.0
    since_refresh: float = 0.0
    last_batch: float = 0.0

    def tensor(self) -> Tensor:
        """The counts as a tensor, which an optimizer's state can hold; shape (5,), float64."""
        return torch.tensor(astuple(self), dtype=torch.float64)

    @classmethod
    def from_tensor(cls, values: Tensor) -> StepCounts:
        """The inverse of ``tensor``."""
        return cls(*values.tolist())


@dataclass(frozen=True)
class Intervals:
    """Decides from the counts, which are the same on all ranks, when to observe and when to compute inverses.

    Args:
        refresh: the longest interval between two computations of the inverses, in examples.
        warmup_refreshes: number of first steps that all compute them.
        observed: examples to observe for each computation.
    """

    refresh: float
    warmup_refreshes: int
    observed: float

    def length(self, counts: StepCounts) -> float:
        """The present interval, in examples: one step at first, growing to ``refresh``."""
        grown = int(counts.refreshes) - self.warmup_refreshes + 1
        # A power of at most 64 is over a million steps, and cannot overflow.
        return min(self.refresh, counts.last_batch * GROWTH ** min(grown, 64)) if grown > 0 else 0.0

    def observes(self, counts: StepCounts) -> bool:
        """Whether the next step is among the last ones before inverses are computed, which observe."""
        return counts.since_refresh + max(self.observed, counts.last_batch) >= self.length(counts)

    def refreshes(self, counts: StepCounts, before: float) -> bool:
        """Whether the inverses are due after an observation; ``before`` is the previous value of ``last_batch``."""
        changed = before > 0 and abs(counts.last_batch - before) > BATCH_CHANGE * before
        return changed or counts.since_refresh >= self.length(counts)

    def share(self, counts: StepCounts) -> float:
        """The share of the examples of a step that is observed: all of them, or as many as are wanted."""
        # Of the batch of the step before, because no rank knows the whole batch of this one yet.
        return min(1.0, self.observed / counts.last_batch) if counts.last_batch > 0 else 1.0
