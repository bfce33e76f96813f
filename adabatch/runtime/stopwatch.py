"""How long the steps of a plan take, agreed on by all ranks.

The host knows what the device does only where it waits for it, which is at the reduction of a measured step. From one
such wait to the next the steps between are timed, with all that belongs to them: data, updates, reductions. What each
rank found rides on the next such reduction, so that it costs 8 bytes and no wait, and is known one measured step late.
"""

from __future__ import annotations

import math
from time import perf_counter

import torch
from torch import Tensor

from adabatch.batch.plan import BatchPlan


class Stopwatch:
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

    def ran(self, plan: BatchPlan, *, whole: bool) -> None:
        """A step's micro-batches are run; ``whole`` says whether they are as many examples as its plan asks for."""
        self._num_steps += 1
        self._steady = self._steady and whole and plan == self._plan
        self._plan = plan

    def interrupt(self) -> None:
        """Something took time that no step of the plan takes: the present span is not timed."""
        self._steady = False

    def outgoing(self, like: Tensor) -> list[Tensor]:
        """What rides on a reduction: shape (1,), of the type and place of ``like``."""
        seconds = math.nan if self._pending is None else self._pending[1]
        return [torch.tensor([seconds / self._size], dtype=like.dtype, device=like.device)]

    def incoming(self, totals: list[float]) -> list[float]:
        """Takes the sum of what the ranks sent off the end of a reduction, and returns the rest; a new span begins."""
        *rest, seconds = totals
        self.timed = None
        if self._pending is not None and 0 < seconds < math.inf:  # not where a rank that was resumed alone had none
            self.timed = self._pending[0], seconds
        now = perf_counter()
        self._pending = None
        if self._mark is not None and self._plan is not None and self._steady:
            self._pending = self._plan, (now - self._mark) / self._num_steps
        self._mark, self._steady, self._num_steps = now, True, 0
        return rest
