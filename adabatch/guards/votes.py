"""Wishes of single ranks that become decisions of all, at the end of the same step: to stop, and to save.

A signal reaches ranks at different moments, and clocks differ. So what a rank wishes is one number that rides on the
reduction which a step makes anyway: 8 bytes more, and no wait more. Of steps that reduce nothing every ``INTERVAL``-th
makes a reduction of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from adabatch.runtime.collectives import Collectives

INTERVAL = 16
"""Steps that reduce nothing from one reduction of wishes to the next: one host sync in so many steps."""

_SAVE = 2.0**20
"""A wish to save, in wishes to stop: more than there are ranks, so that one sum counts both."""


def _never() -> bool:
    return False


class Votes:
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

    def outgoing(self, like: Tensor) -> list[Tensor]:
        """What rides on a reduction: shape (1,), of the type and place of ``like``; nothing where nobody listens."""
        if not self._listening:
            return []
        return [torch.tensor([self._wishes()], dtype=like.dtype, device=like.device)]

    def incoming(self, totals: list[float]) -> list[float]:
        """Takes the sum of what the ranks sent off the end of a reduction, and returns the rest."""
        if not self._listening:
            return totals
        *rest, wishes = totals
        self._hear(wishes)
        return rest

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
