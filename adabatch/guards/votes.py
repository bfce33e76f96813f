"""Wishes of single ranks that become decisions of all, at the end of the same step: to stop, and to save.

A signal reaches ranks at different moments, and clocks differ. So what a rank wishes is one number that rides on the
reduction which a step makes anyway: 8 bytes more, and no wait more. Of steps that reduce nothing every ``INTERVAL``-th
makes a reduction of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adabatch.runtime.collectives import Collectives
from adabatch.runtime.observers import Rider

INTERVAL = 16
"""Steps that reduce nothing from one reduction of wishes to the next: one host sync in so many steps."""

_SAVE = 2.0**20
"""A wish to save, in wishes to stop: more than there are ranks, so that one sum counts both."""


def _never() -> bool:
    return False


class Votes(Rider):
    """What the ranks of a run agreed on.

    Attributes:
        stop: all ranks stop after this step. It stays.
        save: all ranks save after this step.

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
        """Whether somebody may wish anything; the same on all ranks, or they would not reduce alike."""
        return self._listening

    def listen(self, save_due: Callable[[], bool] | None = None) -> None:
        """From now on wishes are exchanged.

        Args:
            save_due: asked in each exchange, says whether this rank wishes to save.
        """
        self._listening = True
        if save_due is not None:
            self._save_due = save_due

    def vote_stop(self) -> None:
        """This rank wishes to stop; safe in a signal handler."""
        self._stop_voted = True

    def outgoing(self, device: torch.device) -> Tensor:
        """This rank's wishes, shape (1,); nothing, shape (0,), where nobody listens."""
        return torch.tensor([self._wishes()] * self._listening, dtype=torch.float64, device=device)

    def incoming(self, totals: Sequence[float]) -> None:
        """The wishes of all ranks."""
        if totals:
            self._hear(*totals)

    def step_without_reduction(self) -> None:
        """At the end of a step that reduces nothing."""
        self.save = False
        self._unheard += 1
        if self._listening and (self._unheard >= INTERVAL or self._collectives.size == 1):
            self._hear(*self._collectives.sum_of(self._wishes()))

    def _wishes(self) -> float:
        return float(self._stop_voted) + _SAVE * self._save_due()

    def _hear(self, wishes: float) -> None:
        self._unheard = 0
        saves, stops = divmod(wishes, _SAVE)
        self.save = saves > 0
        self.stop = self.stop or stops > 0
