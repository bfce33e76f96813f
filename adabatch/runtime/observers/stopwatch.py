"""How long the steps of a plan take, agreed on by all ranks.

The host knows what the device does only when it waits for it, which it does in the reduction of a measured step. The
steps from one such wait to the next are timed together, including data, updates and reductions. Each rank's time is
sent in the next such reduction, so that it costs 8 bytes and no wait, and is known one measured step late.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from time import perf_counter

import torch
from torch import Tensor

from adabatch.batch.plan import BatchPlan
from adabatch.runtime.observers.protocol import Moment, Phase, Rider, StepObserver


class Stopwatch(StepObserver, Rider):
    """Times steps from one measured step to the next.

    Some spans are not timed, on all ranks: those in which the plan changed or a step differed from its plan, and the
    first one after a change, which includes the cost of new shapes (selecting kernels, allocating memory).

    Attributes:
        timed: a plan, and the mean over the ranks of the seconds that a step of it took, from the last reduction; None
            if nothing was timed.

    Args:
        size: number of ranks.
    """

    def __init__(self, size: int) -> None:
        self.timed: tuple[BatchPlan, float] | None = None
        self._size = size
        self._mark: float | None = None  # when the span began, on the host's clock
        self._plan: BatchPlan | None = None  # of the step that ended it
        self._steady = False  # whether all steps of the span were of that plan
        self._num_steps = 0  # steps in the span
        self._pending: tuple[BatchPlan, float] | None = None  # the time of this rank, which the others do not know yet

    def at(self, phase: Phase, moment: Moment) -> None:
        """Counts a step when its micro-batches have run."""
        # a trial takes additional time, so the span around it is not timed
        if phase is Phase.TRIAL:
            self._steady = False
        if phase is Phase.MEASURING:
            # A short step at the end of the data would make its plan look faster than it is.
            whole = moment.num_examples == moment.plan.global_batch_size
            self._num_steps += 1
            self._steady = self._steady and whole and moment.plan == self._plan
            self._plan = moment.plan

    def interrupted(self) -> None:
        """Something else than steps took time, such as an evaluation: the present span is not timed."""
        self._steady = False

    def outgoing(self, device: torch.device) -> Tensor:
        """This rank's share of the mean, shape (1,)."""
        # NaN, not 0: if one rank has no time, there is no mean, where a zero would only lower it.
        seconds = math.nan if self._pending is None else self._pending[1]
        return torch.tensor([seconds / self._size], dtype=torch.float64, device=device)

    def incoming(self, totals: Sequence[float]) -> None:
        """The mean of the ranks' times; a new span begins."""
        (seconds,) = totals
        self.timed = None
        # NaN if a rank had no time, because it alone was resumed
        if self._pending is not None and 0 < seconds < math.inf:
            self.timed = self._pending[0], seconds
        # The clock is read here, because the reduction was a host sync: all work that was queued before it is done.
        now = perf_counter()
        self._pending = None
        if self._mark is not None and self._plan is not None and self._steady:
            self._pending = self._plan, (now - self._mark) / self._num_steps
        # _plan is kept: the first step of the next span is compared with it, so that a change of the plan between two
        # spans is noticed.
        self._mark, self._steady, self._num_steps = now, True, 0
