"""What K-FAC counts between steps."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
from torch import Tensor


@dataclass
class StepCounts:
    """Counts that belong to the whole optimizer; equal on all ranks.

    Args:
        steps: taken.
        observations: calls of ``observe`` that measured.
        refreshes: computations of the inverses.
        since_refresh: examples observed since the inverses were computed.
        last_batch: examples of the last step that observed.
    """

    steps: float = 0.0
    observations: float = 0.0
    refreshes: float = 0.0
    since_refresh: float = 0.0
    last_batch: float = 0.0

    def tensor(self) -> Tensor:
        """The counts, shape (5,), float64: what an optimizer's state can hold."""
        return torch.tensor(astuple(self), dtype=torch.float64)

    @classmethod
    def from_tensor(cls, values: Tensor) -> StepCounts:
        """The inverse of ``tensor``."""
        return cls(*values.tolist())
