"""How long the steps of a plan take, agreed on by all ranks.

The host knows what the device does only where it waits for it, which is at the reduction of a measured step. From one
such wait to the next the steps between are timed, with all that belongs to them: data, updates, reductions. What each
rank found rides on the next such reduction, so that it costs 8 bytes and no wait, and is known one measured step late.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from time import perf_counter

import torch
from torch import Tensor

from adabatch.batch.plan import BatchPlan
from adabatch.runtime.observers import Moment, Phase, Rider, StepObserver


class Stopwatch(StepObserver, Rider):
    """Times steps from one measured step to the next.

    Not timed, on all ranks alike, are spans in which the plan changed or a step was not of its plan, and the first one
    after a change, which pays for new shapes (kernels chosen, memory taken).

    Attributes:
        timed: a plan, and the mean over the ranks of the seconds that a step of it took, from the last reduction; None
            where nothing was timed.

    Args:
        size: how many ranks there are.
    """

    def __init__(self, size: int) -> None:
        self.timed: tuple[BatchPlan, float] | None = None
        self._size = size
        self._mark: float | None = None  # when the span began, on the host's clock
        self._plan: BatchPlan | None = None  # of the step that ended it
        self._steady = False  # whether all steps of the span were of that plan
        self._num_steps = 0  # in the span
        self._pending: tuple[BatchPlan, float] | None = None  # what this rank found, and the others do not know yet

    def at(self, phase: Phase, moment: Moment) -> None:
        """Counts a step whose micro-batches are run; a trial takes time that no step of the plan takes."""
        if phase is Phase.TRIAL:
            self._steady = False
        if phase is Phase.MEASURING:
            whole = moment.num_examples == moment.plan.global_batch_size
            self._num_steps += 1
            self._steady = self._steady and whole and moment.plan == self._plan
            self._plan = moment.plan

    def outgoing(self, device: torch.device) -> Tensor:
        """This rank's share of the mean, shape (1,)."""
        seconds = math.nan if self._pending is None else self._pending[1]
        return torch.tensor([seconds / self._size], dtype=torch.float64, device=device)

    def incoming(self, totals: Sequence[float]) -> None:
        """The mean of what the ranks sent; a new span begins."""
        (seconds,) = totals
        self.timed = None
        if self._pending is not None and 0 < seconds < math.inf:  # not where a rank that was resumed alone had none
            self.timed = self._pending[0], seconds
        now = perf_counter()
        self._pending = None
        if self._mark is not None and self._plan is not None and self._steady:
            self._pending = self._plan, (now - self._mark) / self._num_steps
        self._mark, self._steady, self._num_steps = now, True, 0
