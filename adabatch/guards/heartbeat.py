"""What a rank is doing: the training loop notes each phase that it enters, and another thread reads it."""

from __future__ import annotations

import time
from typing import NamedTuple

from adabatch.runtime.observers.protocol import Moment, Phase, StepObserver


class Position(NamedTuple):
    """What a rank is doing.

    Args:
        phase: the phase that it is in.
        step: number of the step, as in the journal; None outside of steps.
        micro_batch: number of the micro-batch in the step; None if the phase belongs to none.
    """

    phase: Phase
    step: int | None = None
    micro_batch: int | None = None

    def __str__(self) -> str:
        """The words of an error message."""
        part = "" if self.micro_batch is None else f" of micro-batch {self.micro_batch}"
        return self.phase + part + ("" if self.step is None else f" of step {self.step}")


class Heartbeat(StepObserver):
    """The phases that one rank enters.

    All ranks enter the same phases in the same order, so the number of phases tells which rank waits for which.

    Attributes:
        place: what the rank is doing.
        moves: number of phases that it has entered.
        since: when it entered the last one, on this process's monotonic clock, in seconds.
        between: whether it is between two steps, where a run may take any time, to test or to save.
        loops: number of loops over the steps that it has begun, and of states that it has loaded.
        alarm: raised when the next phase begins; set by a monitor once a rank is lost.
    """

    def __init__(self) -> None:
        self.place = Position(Phase.START)
        self.moves = 0
        self.since = time.monotonic()
        self.between = True
        self.loops = 0
        self.alarm: BaseException | None = None

    @property
    def still(self) -> float:
        """Seconds since the rank entered its last phase."""
        return time.monotonic() - self.since

    @property
    def reached(self) -> tuple[int, int]:
        """How far the rank is: its loops over the steps, and the step in the last of them."""
        return self.loops, -1 if self.place.step is None else self.place.step

    def begin_loop(self, step: int) -> None:
        """The rank begins a loop over the steps, of which ``step`` is the first.

        It is no phase: until its first step a rank may take any time, and others wait for it.
        """
        self.loops += 1
        self.place = Position(Phase.BEGIN, step)

    def loaded(self) -> None:
        """A state was loaded, whose step may be an earlier one."""
        self.loops += 1

    def at(self, phase: Phase, moment: Moment) -> None:
        """The rank enters a phase.

        Raises:
            BaseException: the alarm, if it is set.
        """
        self.place = Position(phase, moment.step, moment.micro_batch)
        self.between = phase is Phase.BETWEEN
        self.since = time.monotonic()
        self.moves += 1
        if self.alarm is not None:
            raise self.alarm
