"""The counts that K-FAC keeps between steps."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
from torch import Tensor


@dataclass
class StepCounts:
    """Counts of the whole optimizer, the same on all ranks.

    Args:
        steps: steps so far.
        observations: calls of ``observe`` that measured.
        refreshes: how often the inverses were computed.
        since_refresh: examples observed since the inverses were computed.
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
