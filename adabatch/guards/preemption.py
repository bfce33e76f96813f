"""``Preemption``: a signal to any rank ends the run on all of them, after the same step, in order."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType
from typing import Any, Protocol

from adabatch.guards.votes import Votes

EXIT_PREEMPTED = 75
"""Exit status of a run that was stopped by a signal and has saved itself: the same command goes on from there.

It is EX_TEMPFAIL of sysexits.h: nothing is wrong, try again. 143 would also be that of a process which SIGTERM killed.
"""


class StoppableRun(Protocol):
    """What a preemption tells a run; ``AdaptiveBatch`` is one."""

    @property
    def votes(self) -> Votes:
        """Whether the ranks stop after this step."""
        ...


class Preemption:
    """Listens for the signals that announce the end of an allocation: SIGTERM, and SIGUSR1 of Slurm's ``--signal``.

    ::

        with Preemption(batches) as preemption:
            for step in batches.steps(order, until=total):
                ...
                if preemption.agreed:
                    break
        if preemption.agreed:
            checkpoints.step(now=True)
            sys.exit(adabatch.EXIT_PREEMPTED)

    A signal may reach one rank or all, each at another moment. That it came rides on the reduction that the next step
    makes anyway (8 bytes, no host sync of its own), so ``agreed`` turns True on all ranks after the same step. Of steps
    that reduce nothing (without a probe and with ``skip_nonfinite=False``, or between the averages of local SGD) every
    16th makes one. A second signal changes nothing.

    Args:
        batches: of the run.
        signals: to listen for, in place of what the process did with them; put back at the end of the block.

    Raises:
        ValueError: entered in another thread than the main one, where Python delivers no signals.
    """

    def __init__(
        self, batches: StoppableRun, *, signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGUSR1)
    ) -> None:
        self._votes = batches.votes
        self._signals = tuple(signals)
        self._before: dict[signal.Signals, Any] = {}
        self._votes.listen()

    @property
    def agreed(self) -> bool:
        """Whether all ranks stop after this step; the same on each."""
        return self._votes.stop

    def request(self) -> None:
        """What a signal does, for a run that ends itself early: after a time limit of your own."""
        self._votes.vote_stop()

    def __enter__(self) -> Preemption:
        for number in self._signals:
            self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _received(self, number: int, frame: FrameType | None) -> None:
        self._votes.vote_stop()
