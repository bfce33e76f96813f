"""Votes of single ranks on whether to stop or save, which all ranks count after the same step.

A signal reaches ranks at different times, and their clocks differ. A vote is therefore one number that is added to the
reduction which a step makes anyway: 8 bytes, and no additional wait. If steps reduce nothing, there is a reduction
every ``INTERVAL`` steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adabatch.runtime.collectives import Collectives
from adabatch.runtime.observers.protocol import Rider

INTERVAL = 16
"""Number of steps without a reduction after which the votes are reduced on their own, with one host sync."""

_SAVE = 2.0**20
"""Value of a vote to save; a vote to stop is 1. It is more than the number of ranks, so that one sum counts both."""


def _never() -> bool:
    return False


class Votes(Rider):
    """The decisions on which the ranks of a run agree.

    Attributes:
        stop: whether all ranks stop after this step. It stays True.
        save: whether all ranks save after this step.

    Args:
        collectives: the ranks.
    """

    def __init__(self, collectives: Collectives) -> None:
        self.stop = False
        self.save = False
        self._collectives = collectives
        self._stop_voted = False
        self._save_due: Callable[[], bool] = _never
        self._listening = False
        self._unheard = 0

    @property
    def listening(self) -> bool:
        """Whether votes are exchanged. It must be equal on all ranks, so that they reduce the same numbers."""
        return self._listening

    def listen(self, save_due: Callable[[], bool] | None = None) -> None:
        """Starts to exchange votes.

        Args:
            save_due: called in each exchange; returns whether this rank votes to save.
        """
        self._listening = True
        if save_due is not None:
            self._save_due = save_due

    def vote_stop(self) -> None:
        """Votes to stop; may be called in a signal handler."""
        self._stop_voted = True

    def outgoing(self, device: torch.device) -> Tensor:
        """This rank's votes, shape (1,), or shape (0,) if votes are not exchanged."""
        return torch.tensor([self._votes()] * self._listening, dtype=torch.float64, device=device)

    def incoming(self, totals: Sequence[float]) -> None:
        """Counts the votes of all ranks."""
        if totals:
            self._hear(*totals)

    def step_without_reduction(self) -> None:
        """Called at the end of a step that reduces nothing."""
        # a vote to save is for one step only
        self.save = False
        self._unheard += 1
        # A single rank needs no exchange, so it hears itself at every step.
        if self._listening and (self._unheard >= INTERVAL or self._collectives.size == 1):
            self._hear(*self._collectives.sum_of(self._votes()))

    def _votes(self) -> float:
        return float(self._stop_voted) + _SAVE * self._save_due()

    def _hear(self, votes: float) -> None:
        self._unheard = 0
        # Sums of small whole numbers are exact in float64, so that all ranks count the same.
        saves, stops = divmod(votes, _SAVE)
        self.save = saves > 0
        self.stop = self.stop or stops > 0  # a vote to stop is never withdrawn
