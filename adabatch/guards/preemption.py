"""``Preemption``: a signal to any rank stops the run on all ranks, after the same step."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType
from typing import Any, Protocol, runtime_checkable

from adabatch.arguments import checked
from adabatch.guards.votes import Votes

EXIT_PREEMPTED = 75
"""Exit status of a run that was stopped by a signal and has saved itself. The same command continues it.

This is EX_TEMPFAIL of sysexits.h ("try again"). 143 would be ambiguous: it is also that of a process killed by SIGTERM.
"""


@runtime_checkable
class StoppableRun(Protocol):
    """A run that ``Preemption`` can stop, such as an ``AdaptiveBatch``."""

    @property
    def votes(self) -> Votes:
        """The ranks' votes on whether to stop."""
        ...


class Preemption:
    """Handles the signals that announce the end of an allocation: SIGTERM, and SIGUSR1 of Slurm's ``--signal``.

        with Preemption(batches) as preemption:
            for step in batches.steps(order, until=total):
                ...
                if preemption.agreed:
                    break
        if preemption.agreed:
            checkpoints.step(now=True)
            sys.exit(adabatch.EXIT_PREEMPTED)

    A signal may reach one rank or all of them, at different times. The next reduction that a step makes anyway tells
    the other ranks (8 bytes more, and no host sync of its own), so ``agreed`` becomes True on all ranks after the same
    step. Steps that reduce nothing (without a probe and with ``skip_nonfinite=False``, or between the averages of local
    SGD) make a reduction every 16 steps. A second signal has no effect.

    Args:
        batches: the run.
        signals: which signals to handle. The former handlers are restored at the end of the block.

    Raises:
        ValueError: if the block is entered in another thread than the main one, in which Python delivers no signals.
    """

    @checked
    def __init__(
        self, batches: StoppableRun, *, signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGUSR1)
    ) -> None:
        self._votes = batches.votes
        self._signals = tuple(signals)
        self._before: dict[signal.Signals, Any] = {}
        # From the constructor on, not when a signal comes: all ranks must add the same number of votes to their
        # reductions, and a signal may reach only one of them.
        self._votes.listen()

    @property
    def agreed(self) -> bool:
        """Whether all ranks stop after this step; equal on all of them."""
        return self._votes.stop

    def request(self) -> None:
        """Stops the run as a signal would; for instance, after your own time limit."""
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
        # Only a flag: a handler may run between any two instructions, in the middle of a collective too.
        self._votes.vote_stop()
