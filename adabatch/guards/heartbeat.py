"""Where a rank is in its run: marks that the loop leaves behind, for another thread to read."""

from __future__ import annotations

import time
from typing import NamedTuple

from adabatch.runtime.observers import Moment, Phase, StepObserver


class Position(NamedTuple):
    """What a rank is doing.

    Args:
        phase: what; of a step where ``step`` says which, else of the run.
        step: number of the step, as in the journal.
        micro_batch: number of the micro-batch in it.
    """

    phase: Phase
    step: int | None = None
    micro_batch: int | None = None

    def __str__(self) -> str:
        """As an error names it."""
        part = "" if self.micro_batch is None else f" of micro-batch {self.micro_batch}"
        return self.phase + part + ("" if self.step is None else f" of step {self.step}")


class Heartbeat(StepObserver):
    """The marks of one rank. All ranks of a run pass the same ones in the same order, so their number tells who waits.

    Attributes:
        place: where the rank is.
        moves: marks passed.
        since: when the last was passed, on this process's monotonic clock, in seconds.
        between: whether the rank is between two steps, where a run may stay as long as it likes: to test, to save.
        alarm: raised at the next mark; set by a watch whose run is lost.
    """

    def __init__(self) -> None:
        self.place = Position(Phase.START)
        self.moves = 0
        self.since = time.monotonic()
        self.between = True
        self.alarm: BaseException | None = None

    def at(self, phase: Phase, moment: Moment) -> None:
        """The rank goes on to another phase.

        Raises:
            BaseException: the alarm, where there is one.
        """
        self.place = Position(phase, moment.step, moment.micro_batch)
        self.between = phase is Phase.BETWEEN
        self.since = time.monotonic()
        self.moves += 1
        if self.alarm is not None:
            raise self.alarm
