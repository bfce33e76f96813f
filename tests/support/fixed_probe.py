"""A probe that looks at no gradient: it measures the same in every step."""

from __future__ import annotations

import torch
from torch import Tensor

from adabatch.batch import GradientMoments, Needs
from adabatch.runtime.probes.protocol import Probe


class FixedProbe(Probe):
    """Tells the same moments in every step, as a user's own probe might.

    Args:
        moments: those.
        gives: what it says that it measures.
    """

    def __init__(self, moments: GradientMoments, gives: Needs) -> None:
        self.gives = gives
        self._moments = moments

    def start(self, dp_size: int) -> None: ...

    def begin_part(self, num_examples: int | None = None) -> None: ...

    def end_part(self, num_examples: float, weight: float) -> None: ...

    def collect(self) -> Tensor:
        return torch.zeros(1, dtype=torch.float64)

    def moments(self, totals: list[float]) -> GradientMoments:
        return self._moments

    def stop(self) -> None: ...

    def remove(self) -> None: ...
