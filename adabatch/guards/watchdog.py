"""``Watchdog``: a rank that dies, hangs or raises ends the others too, soon, and by name."""

from __future__ import annotations

import math
from types import TracebackType
from typing import Protocol

import torch.distributed as dist

from adabatch.guards.connections import Connections
from adabatch.guards.heartbeat import Heartbeat
from adabatch.guards.monitor import EXIT_RANK_LOST, Monitor
from adabatch.runtime.collectives import Collectives

__all__ = ["EXIT_RANK_LOST", "RankLost", "Watchdog"]

_CONNECTION_LOST = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""In the messages of collectives whose other end is gone; they are plain RuntimeErrors."""


class RankLost(RuntimeError):
    """Another rank died, hangs or raised; the message says which, where, and what is known of it."""


class WatchedRun(Protocol):
    """What a watchdog reads of a run; ``AdaptiveBatch`` is one."""

    @property
    def collectives(self) -> Collectives:
        """The ranks of the run."""
        ...

    @property
    def heartbeat(self) -> Heartbeat:
        """Where this rank is."""
        ...


class Watchdog:
    """Watches over all ranks while they train.

    ::

        with adabatch.Watchdog(batches, timeout=120):
            for step in batches.steps(order, until=total):
                ...

    A rank that **dies** (killed, out of memory, crashed) is known to the others at once; one that **raises** an error
    in the block tells them. One that **hangs** is found after ``timeout`` seconds without a move: from one part of a
    step to the next (loading, forward, backward, measuring, what follows), while others wait for it further on. So is
    one whose process or machine is frozen or cut off. Then all ranks leave the block by a ``RankLost`` that names it
    and where it was; the one that raised, by its own error. A rank that waits in a collective cannot be interrupted
    from Python: where the backend itself does not give up within ``grace`` seconds, its process writes the same to
    standard error, and where its threads stand, and ends with status ``EXIT_RANK_LOST`` (76). Restart such a run from
    its checkpoint.

    What it cannot tell: who hangs, where all ranks stand in the same part of a step; and a hang in collectives of your
    own between two steps, as a run may test or save there as long as it likes.

    At the end of the block a rank waits for the others. It costs a thread, one connection a rank to rank 0 and a
    message of some 150 bytes a second; the training sends nothing more. On a single process it does nothing.

    Args:
        batches: of the run; every rank makes its watchdog after it.
        timeout: in seconds. Longer than the longest part of a step, and than what one rank does alone between steps.
        grace: see above; in seconds.
        address: host name or number of rank 0, where its machine's own name does not lead to it.

    Raises:
        ValueError: a timeout that is not positive and finite, or a negative grace.
    """

    def __init__(
        self, batches: WatchedRun, *, timeout: float = 300.0, grace: float = 10.0, address: str | None = None
    ) -> None:
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout must be a positive number of seconds, got {timeout!r}")
        if not 0 <= grace < math.inf:
            raise ValueError(f"grace must be a number of seconds, 0 or more, got {grace!r}")
        self._collectives = batches.collectives
        self._heartbeat = batches.heartbeat
        self._timeout = timeout
        self._grace = grace
        self._address = address
        self._monitor: Monitor | None = None

    def __enter__(self) -> Watchdog:
        ranks = self._collectives
        if ranks.size > 1:
            self._monitor = Monitor(
                Connections(ranks, address=self._address, timeout=self._timeout),
                ranks.rank,
                ranks.size,
                self._heartbeat,
                make_alarm=RankLost,
                timeout=self._timeout,
                grace=self._grace,
            )
            self._monitor.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        monitor, self._monitor = self._monitor, None
        if monitor is None:
            return
        if error is None:
            monitor.leave()
            monitor.ended.wait()
        elif _lost_connection(error):
            monitor.ended.wait(self._grace)
        if monitor.finding is not None:
            monitor.stop()
            if error is None or _lost_connection(error):
                raise RankLost(monitor.finding) from error
        elif error is None:
            monitor.stop()
        else:
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            monitor.fail(f"rank {self._collectives.rank} raised {said}, in {self._heartbeat.place}")


def _lost_connection(error: BaseException) -> bool:
    """Whether an error of a collective follows from the end of another rank, rather than from this one."""
    said = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(words in said for words in _CONNECTION_LOST)
    )
