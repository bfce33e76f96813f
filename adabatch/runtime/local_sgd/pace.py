"""How fast a worker steps, and how many local steps it takes in a round so that all arrive together."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median
from time import perf_counter

import torch

ROUNDS = 3
"""The last rounds, of whose times the median counts: one that was disturbed by something else changes nothing."""


def own_steps(local_steps: int, seconds: Sequence[float], worker: int, *, at_least: int = 1) -> int:
    """The local steps of a worker in a round: those of the fastest, or as many as it takes in their time.

    Args:
        local_steps: of the fastest worker.
        seconds: that a step of each worker takes; empty if they are not known yet.
        worker: its number.
        at_least: the smallest number.

    Returns:
        ``floor(local_steps min(seconds) / seconds[worker])``, but no fewer than ``at_least``.

    Source: Liu et al. 2024, arXiv:2401.09135 (dynamic local updates).
    """
    if not seconds:
        return local_steps
    return max(at_least, math.floor(local_steps * min(seconds) / seconds[worker]))


class StepClock:
    """The seconds of a local step of this worker, data and update included, without those in which it waits for others.

    A round is timed from the end of its first step to that of its last, so that what a loop does between rounds does
    not count. A round of a single step is timed from the end of the round before.

    Args:
        device: whose work is to be waited for before the clock is read.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._recent: deque[float] = deque(maxlen=ROUNDS)
        self._since_round: float | None = None  # the end of the round before, less the seconds waited so far
        self._since_step: float | None = None  # the same, of the first step of this round
        self._num_steps = 0  # since that step

    @property
    def seconds(self) -> float:
        """The median of the last rounds; 0 if none was timed."""
        return median(self._recent) if self._recent else 0.0

    def step(self, waited: float, *, last: bool) -> None:
        """A local step is over.

        Args:
            waited: seconds in which this worker has waited for others so far.
            last: whether it ends the round; the average follows.
        """
        if self._since_step is None:
            now = self._now(waited)
            if last and self._since_round is not None:
                self._recent.append(now - self._since_round)
            self._since_step = now
            return
        self._num_steps += 1
        if last:
            self._recent.append((self._now(waited) - self._since_step) / self._num_steps)

    def round_over(self, waited: float) -> None:
        """The average is over, and the next step begins a round."""
        self._since_round, self._since_step, self._num_steps = self._now(waited), None, 0

    def _now(self, waited: float) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)  # host sync, three times in a round
        return perf_counter() - waited
